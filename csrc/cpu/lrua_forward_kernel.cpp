// Forward of the memory with least recently used access over a whole sequence: the controller as in
// common/machine_forward.h, memories transposed to [M][stride], slots in lanes. All heads of a step
// of a row act together; its memory stays in L2:
//   pass 1  the R slots of least usage; weightings to write with, from gates and those read with
//   pass 2  the chosen slots to zero, all adds to the memory; its norms and its similarity to all
//           keys, in the same pass
//   pass 3  softmax of the similarities: weightings to read with
//   pass 4  the reads; the usage moves on
#include "../common/machine_forward.h"

#include "lrua_memory.h"

namespace seqmem::lrua {
namespace {

template <class C>
class ForwardHeads {
  const lrua::Shape& s;
  const Forward& a;
  const Slots<C> slots;
  const int64_t matrix, weightings;  // values of a row's

  // Shared by all threads.
  C *memory, *usage, *weights;  // of all rows
  C* initial_memory;
  // This thread's own.
  typename SlotMatrix<C>::Content content;
  HeadValues<C> values;
  Head<C>* head;
  int64_t* least;
  C *written, *dots, *norm, *kept;

 public:
  using Shape = lrua::Shape;
  using Arguments = Forward;

  ForwardHeads(const Shape& s, const Forward& a)
      : s(s), a(a), slots(s), matrix(slots.size()), weightings(s.heads * slots.stride), values(s) {}

  void place_shared(Carver& take) {
    memory = take.array<C>(s.B * matrix);
    usage = take.array<C>(s.B * slots.stride);
    weights = take.array<C>(s.B * weightings);
    initial_memory = take.array<C>(s.reset ? matrix : 0);
  }

  void place_own(Carver& take) {
    content.place(take, slots);
    values.place(take);
    head = take.array<Head<C>>(s.heads);
    least = take.array<int64_t>(s.heads);
    written = take.array<C>(weightings);
    dots = take.array<C>(weightings);
    norm = take.array<C>(slots.stride);
    kept = take.array<C>(slots.stride);
  }

  void prepare(int thread) {
    values.prepare();
    slots.keep_all(kept);
    if (s.reset != nullptr && thread == 0)
      slots.load_memory(static_cast<const C*>(a.initial.memory), initial_memory);
  }

  void load(int64_t b, const State<const void*>& state, int64_t from) {
    for (int64_t h = 0; h < s.heads; ++h)
      slots.load_weights(static_cast<const C*>(state.weightings) + (from * s.heads + h) * s.N,
                         weights_of(b) + h * slots.stride);
    slots.load_weights(static_cast<const C*>(state.usage) + from * s.N, usage_of(b));
    if (&state == &a.initial) {
      copy(initial_memory, memory_of(b), matrix);
    } else {
      slots.load_memory(static_cast<const C*>(state.memory) + from * s.N * s.M, memory_of(b));
    }
  }

  void store(int64_t b) const {
    const State<void*>& to = a.final;
    put_weightings(weights_of(b), to.weightings, b);
    copy<C>(usage_of(b), static_cast<C*>(to.usage) + b * s.N, s.N);
    slots.store_memory(memory_of(b), static_cast<C*>(to.memory) + b * s.N * s.M);
  }

  void keep(int64_t t, int64_t b) const {
    copy(memory_of(b), static_cast<C*>(a.checkpoints) + (t / s.segment * s.B + b) * matrix, matrix);
  }

  void ended(int64_t t, int64_t b) const {
    const int64_t row = t * s.B + b;
    for (void* trace : {a.write_trace, a.trace})
      if (trace != nullptr) zero(static_cast<C*>(trace) + row * s.heads * s.N, s.heads * s.N);
    if (a.usage_trace != nullptr) zero(static_cast<C*>(a.usage_trace) + row * s.N, s.N);
    if (a.slots != nullptr) zero(a.slots + row * s.heads, s.heads);
  }

  void activate(int64_t n, C* const* p) const {
    for (int64_t r = 0; r < n; ++r) values.activate(p[r]);
  }

  void act(int64_t t, int64_t b, const C* activated, C* reads) {
    for (int64_t h = 0; h < s.heads; ++h) head[h] = values.head(activated, h);
    C *used = usage_of(b), *w = weights_of(b);
    least_used(used, s.N, s.heads, least);
    slots.write_weights(head, least, w, written);
    slots.write(memory_of(b), memory_of(b), least, written, head, kept, norm, dots);
    for (int64_t h = 0; h < s.heads; ++h) {
      const C scale = slots.template content<false>(dots + h * slots.stride, norm, head[h].key_norm,
                                                    head[h].strength, content);
      slots.scale(content.content, scale, w + h * slots.stride);
    }
    slots.sum_slots(memory_of(b), w, reads, s.M);
    slots.use(static_cast<C>(s.gamma), w, written, used);

    const int64_t row = t * s.B + b;
    if (a.slots != nullptr) copy(least, a.slots + row * s.heads, s.heads);
    if (a.trace != nullptr) put_weightings(w, a.trace, row);
    if (a.write_trace != nullptr) put_weightings(written, a.write_trace, row);
    if (a.usage_trace != nullptr) copy<C>(used, static_cast<C*>(a.usage_trace) + row * s.N, s.N);
  }

 private:
  C* memory_of(int64_t b) const { return memory + b * matrix; }
  C* usage_of(int64_t b) const { return usage + b * slots.stride; }
  C* weights_of(int64_t b) const { return weights + b * weightings; }

  void put_weightings(const C* from, void* to, int64_t row) const {
    for (int64_t h = 0; h < s.heads; ++h)
      copy<C>(from + h * slots.stride, static_cast<C*>(to) + (row * s.heads + h) * s.N, s.N);
  }
};

template <class C>
using Run = ForwardRun<C, ForwardHeads<C>>;

}  // namespace

const Kernel<Forward, Shape> SEQMEM_ISA::forward_kernel =
    Entry<Run, Types::FloatAndDouble, Forward, Shape>::table;

}  // namespace seqmem::lrua
