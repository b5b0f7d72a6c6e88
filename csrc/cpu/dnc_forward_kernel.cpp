// Forward of the Differentiable Neural Computer over a whole sequence: the controller as in
// common/machine_forward.h, memories transposed to [M][stride], slots in lanes. One step of a row,
// whose memory and links stay in L2:
//   pass 1  activations of the interface; usage
//   pass 2  the memory's similarity to the write keys, its softmax; sort and product: allocation;
//           weightings to write with
//   pass 3  erase and write, the memory's norms with it
//   pass 4  links move on, both directions with them (dnc_links.h); precedence
//   pass 5  similarity to the read keys, softmax; weightings to read with; reads
#include "../common/machine_forward.h"

#include "dnc_step.h"

namespace seqmem::dnc {
namespace {

template <class C>
class ForwardHeads {
  const dnc::Shape& s;
  const Forward& a;
  const Slots<C> slots;
  const Steps<C> steps;
  const int64_t matrix, links;  // values of a row's memory and links

  // Shared by all threads, of all rows.
  C *memory, *norm, *usage, *link, *precedence, *written, *read;
  C *initial_memory, *initial_norm;
  // This thread's own.
  Values<C> values;
  Step<C> step;

 public:
  using Shape = dnc::Shape;
  using Arguments = Forward;

  ForwardHeads(const Shape& s, const Forward& a)
      : s(s),
        a(a),
        slots(s),
        steps(slots),
        matrix(slots.size()),
        links(s.linked() * s.N * slots.stride),
        values(s, a.norm_weight, a.norm_bias) {}

  void place_shared(Carver& take) {
    const int64_t stride = slots.stride;
    memory = take.array<C>(s.B * matrix);
    norm = take.array<C>(s.B * stride);
    usage = take.array<C>(s.B * stride);
    link = take.array<C>(s.B * links);
    precedence = take.array<C>(s.B * s.linked() * stride);
    written = take.array<C>(s.B * s.writes * stride);
    read = take.array<C>(s.B * s.reads * stride);
    initial_memory = take.array<C>(s.reset ? matrix : 0);
    initial_norm = take.array<C>(s.reset ? stride : 0);
  }

  void place_own(Carver& take) {
    values.place(take);
    step.place(take, slots, values.size());
  }

  void prepare(int thread) {
    values.prepare();
    if (s.reset == nullptr || thread != 0) return;
    slots.load_memory(static_cast<const C*>(a.initial.memory), initial_memory);
    slots.norms(initial_memory, initial_norm, C(s.norm_floor));
  }

  void load(int64_t b, const State<const void*>& state, int64_t from) {
    const Rows now = rows_of(b);
    load_rows(state.usage, from, 1, now.usage);
    load_rows(state.link, from, s.linked() * s.N, now.link);
    load_rows(state.precedence, from, s.linked(), now.precedence);
    load_rows(state.write_weights, from, s.writes, now.written);
    load_rows(state.read_weights, from, s.reads, now.read);
    if (&state == &a.initial) {
      copy(initial_memory, now.memory, matrix);
      copy(initial_norm, now.norm, slots.stride);
    } else {
      slots.load_memory(static_cast<const C*>(state.memory) + from * s.N * s.M, now.memory);
      slots.norms(now.memory, now.norm, C(s.norm_floor));
    }
  }

  void store(int64_t b) const {
    const Rows now = rows_of(b);
    const State<void*>& to = a.final;
    slots.store_memory(now.memory, static_cast<C*>(to.memory) + b * s.N * s.M);
    store_rows(now.usage, 1, to.usage, b);
    store_rows(now.link, s.linked() * s.N, to.link, b);
    store_rows(now.precedence, s.linked(), to.precedence, b);
    store_rows(now.written, s.writes, to.write_weights, b);
    store_rows(now.read, s.reads, to.read_weights, b);
  }

  void keep(int64_t t, int64_t b) const {
    const Rows now = rows_of(b);
    const int64_t row = t / s.segment * s.B + b;
    C* to = static_cast<C*>(a.checkpoints) + row * s.checkpoint();
    store_rows(now.memory, s.M, to, 0);
    store_rows(now.link, s.linked() * s.N, to + s.M * s.N, 0);
    store_rows(now.precedence, s.linked(), to + (s.M + s.linked() * s.N) * s.N, 0);
  }

  void ended(int64_t t, int64_t b) const {
    if (a.usage_trace == nullptr) return;
    const int64_t row = t * s.B + b;
    zero(static_cast<C*>(a.usage_trace) + row * s.N, s.N);
    zero(static_cast<C*>(a.write_trace) + row * s.writes * s.N, s.writes * s.N);
    zero(static_cast<C*>(a.read_trace) + row * s.reads * s.N, s.reads * s.N);
  }

  // The saved p is the one that the controller gives.
  void activate(int64_t, C* const*) const {}

  void act(int64_t t, int64_t b, const C* p, C* reads) {
    const Rows now = rows_of(b);
    const int64_t stride = slots.stride;
    values.run(p, step.values);
    slots.use(step.values + slots.at.free, now.read, now.written, now.usage, step.psi);
    steps.write_weights(step, now.usage, now.memory, now.norm, now.written);
    slots.write(now.memory, now.memory, now.written, step.values, step.psi, now.norm);
    for (int64_t h = 0; h < s.linked(); ++h) {
      C *l = now.link + h * s.N * stride, *w = now.written + h * stride;
      move_links(s.N, stride, l, l, w, now.precedence + h * stride, s.reads, now.read,
                 steps.direction(step.forward, h, 0), steps.direction(step.backward, h, 0));
    }
    if (s.links) slots.precede(now.written, now.precedence, now.precedence);
    if (s.sharpen) steps.sharpen(step);
    slots.look_up(now.memory, steps.reads(step, now.norm), step.content);
    steps.mix(step, now.read);
    slots.read_all(now.memory, now.read, s.reads, reads);
    if (a.usage_trace == nullptr) return;
    const int64_t row = t * s.B + b;
    store_rows(now.usage, 1, a.usage_trace, row);
    store_rows(now.written, s.writes, a.write_trace, row);
    store_rows(now.read, s.reads, a.read_trace, row);
  }

 private:
  struct Rows {
    C *memory, *norm, *usage, *link, *precedence, *written, *read;
  };
  Rows rows_of(int64_t b) const {
    const int64_t stride = slots.stride;
    return {memory + b * matrix,
            norm + b * stride,
            usage + b * stride,
            link + b * links,
            precedence + b * s.linked() * stride,
            written + b * s.writes * stride,
            read + b * s.reads * stride};
  }

  // Between rows of N and of a stride; `row` counts those of a tensor, of `n` each.
  void load_rows(const void* from, int64_t row, int64_t n, C* to) const {
    const C* x = static_cast<const C*>(from) + row * n * s.N;
    for (int64_t k = 0; k < n; ++k) slots.load_weights(x + k * s.N, to + k * slots.stride);
  }
  void store_rows(const C* from, int64_t n, void* to, int64_t row) const {
    C* x = static_cast<C*>(to) + row * n * s.N;
    for (int64_t k = 0; k < n; ++k) copy(from + k * slots.stride, x + k * s.N, s.N);
  }
};

template <class C>
using Run = ForwardRun<C, ForwardHeads<C>>;

}  // namespace

const Kernel<Forward, Shape> SEQMEM_ISA::forward_kernel =
    Entry<Run, Types::FloatAndDouble, Forward, Shape>::table;

}  // namespace seqmem::dnc
