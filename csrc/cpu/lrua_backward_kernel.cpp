// Backward of the memory with least recently used access over a whole sequence, as in
// common/machine_backward.h. The memories of a segment's steps are recomputed from its checkpoint
// (lrua_recompute.h). One step of a row, for all its heads, from the gradients of reads, weightings
// and memory [M][stride], which stay in L2:
//   pass 1  dw += M dread; softmax and cosine: dz of the dots, and the norms' part of each slot
//   pass 2  dkey = M^T dz;  dM += w dread^T + dz key^T + the norms' part of M
//   pass 3  dadd = dM^T written;  dwritten = dM add, which splits into the gate's gradient and that
//           of the weightings before
//   pass 4  dM of the erased slots becomes zero
// With K = D / q and q = n |k| + eps: dD = dK / q, dq = -dK K / q, dn = dq |k|, d|k| = dq.n, and a
// norm passes dn M / n on to its slot, nothing at zero.
#include "../common/machine_backward.h"

#include "lrua_memory.h"
#include "lrua_recompute.h"

namespace seqmem::lrua {
namespace {

template <class C>
class BackwardHeads {
  static constexpr int L = kLanes<C>;

  const lrua::Shape& s;
  const Backward& a;
  const Layout<C, lrua::Shape>& layout;
  const Saved<C, lrua::Shape, Backward>& saved;
  const Slots<C> slots;
  const HeadLayout head_layout;

  // Shared by all threads.
  C *initial_memory, *initial_weights;
  // This thread's own.
  HeadValues<C> values;
  Recompute<C> again;
  C *dz, *dwritten, *of_norm;  // [heads][stride] twice, [stride]
  C *dkey, *dadd, *key_norm;   // [heads][M] twice, [heads]

 public:
  using Shape = lrua::Shape;
  using Arguments = Backward;
  using Carries = machine::Carries<C, Shape>;

  BackwardHeads(const Shape& s, const Backward& a, const Layout<C, Shape>& layout,
                const Saved<C, Shape, Backward>& saved, int64_t rows)
      : s(s),
        a(a),
        layout(layout),
        saved(saved),
        slots(s),
        head_layout(s),
        values(s),
        again(s, a, saved, layout, slots, values, rows) {}

  Carries carries() const { return Carries(s, layout, slots); }

  void place_shared(Carver& take) {
    initial_memory = take.array<C>(s.reset ? slots.size() : 0);
    initial_weights = take.array<C>(s.reset ? s.heads * slots.stride : 0);
    again.reset_to(initial_memory, initial_weights);
  }

  void place_own(Carver& take) {
    values.place(take);
    again.place(take);
    dz = take.array<C>(s.heads * slots.stride);
    dwritten = take.array<C>(s.heads * slots.stride);
    of_norm = take.array<C>(slots.stride);
    dkey = take.array<C>(s.heads * s.M);
    dadd = take.array<C>(s.heads * s.M);
    key_norm = take.array<C>(s.heads);
  }

  void prepare(int thread) {
    values.prepare();
    again.prepare();
    if (s.reset == nullptr || thread != 0) return;
    slots.load_memory(static_cast<const C*>(a.initial.memory), initial_memory);
    const C* weights = static_cast<const C*>(a.initial.weightings);
    for (int64_t h = 0; h < s.heads; ++h)
      slots.load_weights(weights + h * s.N, initial_weights + h * slots.stride);
  }

  void recompute(int64_t t0, int64_t t1, int64_t b, int64_t j) const { again.run(t0, t1, b, j); }

  void back(int64_t t, int64_t b, int64_t j, const Carry<C>& c, const C* dreads, C* dp) const {
    const Step<C>& step = again.step_of(j, t);
    const int64_t row = t * s.B + b, stride = slots.stride;
    add_trace(a.grad_trace, row, c.weights);
    slots.add_sums(step.memory, dreads, s.M, c.weights);
    zero(of_norm, stride);
    for (int64_t h = 0; h < s.heads; ++h) content(step, h, c.weights, dp);
    slots.sum_slots(step.memory, dz, dkey, s.M);
    slots.add_outer(step.weights, dreads, s.M, dz, step.head, of_norm, step.memory, c.memory);
    slots.sum_slots(c.memory, step.written, dadd, s.M);
    for (int64_t h = 0; h < s.heads; ++h) put_vectors(step.head[h], h, dp);
    zero(dwritten, s.heads * stride);
    add_trace(a.grad_write_trace, row, dwritten);
    slots.add_sums(c.memory, step.head[0].add, head_layout.size, dwritten);
    for (int64_t h = 0; h < s.heads; ++h) gate(step, h, c.weights, dp);
    for (int64_t h = 0; h < s.erased; ++h)
      for (int64_t m = 0; m < s.M; ++m) c.memory[m * stride + step.slots[h]] = 0;
    values.back(saved.values(t, b), dp);
  }

 private:
  // to += the gradient of a trace, if there is one.
  void add_trace(const void* grad, int64_t row, C* to) const {
    if (grad == nullptr) return;
    const C* from = static_cast<const C*>(grad) + row * s.heads * s.N;
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.N; ++i) to[h * slots.stride + i] += from[h * s.N + i];
  }

  // From head h's dw: dz, its part of of_norm, and the gradients of strength and |key|.
  void content(const Step<C>& step, int64_t h, const C* dweights, C* dp) const {
    const Head<C>& head = step.head[h];
    const C *w = step.weights + h * slots.stride, *dw = dweights + h * slots.stride;
    const C* dots = step.dots + h * slots.stride;
    Vec<C> product{}, strength{}, norm{};
    for (int64_t v = 0; v < slots.vectors; ++v) product += load(w + v * L) * load(dw + v * L);
    const C inside = lane_sum<C>(product);
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> n = load(step.norm + v * L);
      const Vec<C> inverse = C(1) / (n * head.key_norm + C(kEpsilon));
      const Vec<C> similar = load(dots + v * L) * inverse;
      const Vec<C> y = load(w + v * L) * (load(dw + v * L) - inside);
      const Vec<C> dot = y * head.strength * inverse, q = -(dot * similar);
      strength += y * similar;
      norm += q * n;
      store(dz + h * slots.stride + v * L, dot);
      const Vec<C> part = n > C(0) ? q * head.key_norm / n : Vec<C>{};
      store(of_norm + v * L, load(of_norm + v * L) + part);
    }
    if (s.strength) dp[h * head_layout.size + head_layout.strength] = lane_sum<C>(strength);
    key_norm[h] = head.key_norm > C(0) ? lane_sum<C>(norm) / head.key_norm : C(0);
  }

  // The gradients of head h's key and add, which may be one.
  void put_vectors(const Head<C>& head, int64_t h, C* dp) const {
    C *key = dp + h * head_layout.size, *add = key + head_layout.add;
    for (int64_t m = 0; m < s.M; ++m) {
      key[m] = dkey[h * s.M + m] + key_norm[h] * head.key[m];
      const C of_add = dadd[h * s.M + m];
      add[m] = s.own_add ? of_add : key[m] + of_add;
    }
  }

  // written = gate before + (1 - gate) 1[slot]
  void gate(const Step<C>& step, int64_t h, C* dbefore, C* dp) const {
    const C *d = dwritten + h * slots.stride, *before = step.before + h * slots.stride;
    const C gate = step.head[h].gate;
    Vec<C> sum{};
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> x = load(d + v * L);
      sum += x * load(before + v * L);
      store(dbefore + h * slots.stride + v * L, x * gate);
    }
    dp[h * head_layout.size + head_layout.gate] = lane_sum<C>(sum) - d[step.slots[h]];
  }
};

template <class C>
using Run = BackwardRun<C, BackwardHeads<C>>;

}  // namespace

const Kernel<Backward, Shape> SEQMEM_ISA::backward_kernel =
    Entry<Run, Types::FloatAndDouble, Backward, Shape>::table;

}  // namespace seqmem::lrua
