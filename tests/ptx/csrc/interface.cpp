// The functions that Python calls through ctypes (machine.py).
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "grid.h"

namespace {

using namespace ptx;

const Operations& operations() {
  static const Operations table = [] {
    Operations made;
    add_integer_operations(made);
    add_float_operations(made);
    add_comparisons(made);
    add_conversions(made);
    add_exchanges(made);
    add_matrix_operations(made);
    add_group_products(made);
    add_memory_operations(made);
    add_copies(made);
    add_mbarriers(made);
    return made;
  }();
  return table;
}

}  // namespace

extern "C" {

// As machine.py's, field by field.
struct PtxInstruction {
  const char* operation;  // null unless control is Plain
  int control, convergent, guard, guard_negated, members;
  int first_operand, operands;
  uint32_t wide;
  int64_t immediate;
  int bytes, count, space, flags;
};

bool ptx_has(const char* operation) { return operations().contains(operation); }

Program* ptx_program(const PtxInstruction* instructions, int count, const int* operands,
                     int operand_count, const int* registers) {
  auto* program = new Program;
  program->narrow = registers[0];
  program->wide = registers[1];
  program->predicates = registers[2];
  program->operands.assign(operands, operands + operand_count);
  for (int k = 0; k < count; ++k) {
    const PtxInstruction& from = instructions[k];
    Instruction i;
    if (from.operation) i.run = operations().at(from.operation);
    i.control = Control(from.control);
    i.convergent = from.convergent;
    i.guard = from.guard;
    i.guard_negated = from.guard_negated;
    i.members = from.members;
    i.number = k;
    i.operand = program->operands.data() + from.first_operand;
    i.operands = from.operands;
    i.wide = from.wide;
    i.immediate = from.immediate;
    i.bytes = static_cast<uint8_t>(from.bytes);
    i.count = static_cast<uint8_t>(from.count);
    i.space = static_cast<uint8_t>(from.space);
    i.flags = static_cast<uint8_t>(from.flags);
    program->instructions.push_back(i);
  }
  return program;
}

void ptx_constant(Program* program, int kind, int number, uint64_t value) {
  program->constants[kind].emplace_back(number, value);
}

void ptx_special(Program* program, int number, int what) {
  program->special.emplace_back(number, what);
}

void ptx_free_program(Program* program) { delete program; }

Launch* ptx_launch(const Program* program, const Options* options, const uint8_t* parameters,
                   int bytes) {
  return new Launch(*program, *options, std::vector<uint8_t>(parameters, parameters + bytes));
}

void ptx_region(Launch* launch, uint64_t base, uint64_t bytes, int label, bool written) {
  launch->add_region(base, bytes, label, written);
}

// Why the launch did not end, or null. The text lives until the next call.
const char* ptx_run(Launch* launch) {
  static std::string why;
  try {
    launch->run();
  } catch (const std::exception& error) {
    why = error.what();
    return why.c_str();
  }
  return nullptr;
}

int ptx_report_count(const Launch* launch) { return static_cast<int>(launch->reports.size()); }

const Report* ptx_reports(const Launch* launch) { return launch->reports.data(); }

uint64_t ptx_instructions(const Launch* launch) { return launch->instructions; }

void ptx_free_launch(Launch* launch) { delete launch; }

// A C++ name as written in the source, to be freed by ptx_free_text; null if it is none.
char* ptx_demangled(const char* name) {
  int status = 0;
  return abi::__cxa_demangle(name, nullptr, nullptr, &status);
}

void ptx_free_text(char* text) { std::free(text); }

}  // extern "C"
