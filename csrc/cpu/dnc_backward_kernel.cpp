// Backward of the Differentiable Neural Computer over a whole sequence, as in
// common/machine_backward.h. Memories and links of a segment's steps are formed again from its
// checkpoint (dnc_recompute.h). One step of a row, last parts first, with dM [M][stride] and dL
// [N][stride] in place:
//   pass 1  reads: dq; content and modes of reading, once more
//   pass 2  links in reverse (dnc_links_backward.h), and precedence
//   pass 3  dM of reads and read content; the write in reverse: erase, vectors, dw
//   pass 4  the write heads in reverse, from the last: content, allocation, once more, and usage
//   pass 5  dM of write content; usage and free gates; activations and norm
#include "../common/machine_backward.h"

#include "dnc_carry.h"
#include "dnc_links_backward.h"
#include "dnc_recompute.h"
#include "dnc_slots_backward.h"

namespace seqmem::dnc {
namespace {

template <class C>
class BackwardHeads {
  static constexpr int L = kLanes<C>;

  const dnc::Shape& s;
  const Backward& a;
  const Layout<C, dnc::Shape>& layout;
  const machine::Saved<C, dnc::Shape, Backward>& saved;
  const Slots<C> slots;
  const Steps<C> steps;
  const SlotsBackward<C> reverse;
  const Parts& at;
  const int64_t stride;

  // Shared by all threads.
  C* initial;
  // This thread's own.
  Values<C> values;
  Recompute<C> again;
  Step<C> step;
  typename SlotsBackward<C>::Scratch scratch;
  C *dbefore, *dcontent, *sums, *down, *along, *c1, *c2;  // [reads][stride]
  C *of_forward, *of_backward;                            // [linked][reads][stride]
  C *dwrite, *dusage, *dpsi, *dallocation, *products;     // [writes][stride], [stride]

 public:
  using Shape = dnc::Shape;
  using Arguments = Backward;
  using Carries = dnc::Carries<C>;

  BackwardHeads(const Shape& s, const Backward& a, const Layout<C, Shape>& layout,
                const machine::Saved<C, Shape, Backward>& saved, int64_t rows)
      : s(s),
        a(a),
        layout(layout),
        saved(saved),
        slots(s),
        steps(slots),
        reverse(slots),
        at(slots.at),
        stride(slots.stride),
        values(s, a.norm_weight, a.norm_bias),
        again(s, a, saved, layout, slots, values.size(), rows) {}

  // So few that what is formed again of a segment, for all of them, stays near.
  static int64_t most_rows(const Shape& s) {
    constexpr int64_t kCache = 2 << 20;
    const int64_t step = (s.M + s.linked() * s.N) * s.stride() * static_cast<int64_t>(sizeof(C));
    return max<int64_t>(1, kCache / (step * (s.segment + 2)));
  }

  Carries carries() const { return Carries(s, layout, slots); }

  void place_shared(Carver& take) {
    initial = take.array<C>(s.reset ? again.initial_size() : 0);
    again.reset_to(initial);
  }

  void place_own(Carver& take) {
    values.place(take);
    again.place(take);
    step.place(take, slots, values.size());
    scratch.place(take, slots);
    for (C** one : {&dbefore, &dcontent, &sums, &down, &along, &c1, &c2})
      *one = take.array<C>(s.reads * stride);
    for (C** one : {&of_forward, &of_backward}) *one = take.array<C>(s.linked() * s.reads * stride);
    dwrite = take.array<C>(s.writes * stride);
    for (C** one : {&dusage, &dpsi, &dallocation, &products}) *one = take.array<C>(stride);
  }

  void prepare(int thread) {
    values.prepare();
    if (thread != 0) return;
    if (s.reset != nullptr) again.load_initial(initial);
    if (a.grad_norm != nullptr) zero(static_cast<C*>(a.grad_norm), s.B * 2 * s.P);
  }

  void recompute(int64_t t0, int64_t t1, int64_t b, int64_t j) const {
    again.run(t0, t1, b, j, values);
  }

  void back(int64_t t, int64_t b, int64_t j, const Carry<C>& c, const C* dreads, C* dp) {
    const Seen<C>& x = again.step_of(j, t);
    const int64_t row = t * s.B + b;
    add_trace(a.grad_usage_trace, row, 1, c.usage);
    add_trace(a.grad_write_trace, row, s.writes, c.written);
    add_trace(a.grad_read_trace, row, s.reads, c.read);
    step.values = const_cast<C*>(x.values);

    reverse.add_sums(x.memory_after, dreads, s.reads, c.read, sums);
    const auto reads = steps.reads(step, const_cast<C*>(x.norm_after));
    slots.look_up(x.memory_after, reads, step.content);
    zero(dbefore, s.reads * stride);
    if (s.links) {
      modes(x, c, dp);
      links(x, c, dp);
    } else {
      copy(c.read, dcontent, s.reads * stride);
    }
    reverse.add_outer(x.read_after, dreads, s.reads, c.memory);
    reverse.look_up(x.memory_after, reads, dcontent, dp + at.read_keys, dp + at.read_strengths,
                    s.masks ? dp + at.read_masks : nullptr, c.memory, scratch);

    zero(dpsi, stride);
    const C* free = x.values + at.free;
    slots.each([&](int64_t i) { store(step.psi + i, slots.kept(free, x.read, i)); });
    reverse.write(x.memory, x.written_after, x.values, step.psi, c.memory, dp + at.erase,
                  dp + at.vectors, c.written, s.deallocate ? dpsi : nullptr);
    write_heads(x, c, dp);
    usage(x, c, dp);
    C* of_norm = static_cast<C*>(a.grad_norm);
    values.back(saved.values(t, b), x.values, dp, of_norm ? of_norm + b * 2 * s.P : nullptr);
  }

 private:
  // to += the gradient of a trace, if there is one.
  void add_trace(const void* grad, int64_t row, int64_t heads, C* to) const {
    if (grad == nullptr) return;
    const C* from = static_cast<const C*>(grad) + row * heads * s.N;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < s.N; ++i) to[h * stride + i] += from[h * s.N + i];
  }

  C product(const C* x, const C* y) const {
    Vec<C> sum{};
    slots.each([&](int64_t i) { sum += load(x + i) * load(y + i); });
    return lane_sum<C>(sum);
  }
  // to = (to +) factor x
  void add(C factor, const C* x, C* to) const {
    slots.each([&](int64_t i) { store(to + i, load(to + i) + factor * load(x + i)); });
  }

  // The content's mode and gradient; where directions are sharpened, also theirs, back to the
  // directions.
  void modes(const Seen<C>& x, const Carry<C>& c, C* dp) {
    for (int64_t r = 0; r < s.reads; ++r) {
      const int64_t mode = at.modes + r * at.directions + s.writes;
      dp[mode] = product(c.read + r * stride, step.read_content + r * stride);
      slots.scale(c.read + r * stride, x.values[mode], dcontent + r * stride);
    }
    if (!s.sharpen) return;
    const int64_t all = s.writes * s.reads * stride;
    copy(x.forward, step.forward, all);
    copy(x.backward, step.backward, all);
    steps.sharpen(step);
    for (int64_t r = 0; r < s.reads; ++r) {
      dp[at.forward_sharpness + r] = dp[at.backward_sharpness + r] = 0;
      for (int64_t h = 0; h < s.writes; ++h) {
        unsharpen(x.forward, step.forward, 0, h, r, c, at.forward_sharpness,
                  at.modes + r * at.directions + s.writes + 1 + h, of_forward, dp);
        unsharpen(x.backward, step.backward, all, h, r, c, at.backward_sharpness,
                  at.modes + r * at.directions + h, of_backward, dp);
      }
    }
  }

  void unsharpen(const C* raw, const C* sharpened, int64_t offset, int64_t h, int64_t r,
                 const Carry<C>& c, int64_t sharpness, int64_t mode, C* out, C* dp) {
    const int64_t d = (h * s.reads + r) * stride;
    dp[mode] = product(c.read + r * stride, sharpened + d);
    slots.scale(c.read + r * stride, step.values[mode], out + d);
    dp[sharpness + r] +=
        reverse.sharpen(raw + d, sharpened + d, step.scaled + offset + d, step.logs + offset + d,
                        C(1) + step.values[sharpness + r], out + d);
  }

  void links(const Seen<C>& x, const Carry<C>& c, C* dp) {
    for (int64_t h = 0; h < s.writes; ++h) {
      const C *w = x.written_after + h * stride, *before = x.precedence + h * stride;
      C *dw = c.written + h * stride, *d = c.precedence + h * stride;
      // p_t = (1 - sum w) p + w
      Vec<C> all{};
      slots.each([&](int64_t i) { all += load(w + i); });
      const C inside = product(before, d), rest = C(1) - lane_sum<C>(all);
      slots.each([&](int64_t i) {
        store(dw + i, slots.true_lanes(i, load(dw + i) + load(d + i) - inside, Vec<C>{}));
        store(d + i, rest * load(d + i));
      });
      const C *x1 = c.read, *x2 = c.read, *f1 = x.read, *f2 = x.read;
      if (s.sharpen) {
        x1 = steps.direction(of_forward, h, 0), x2 = steps.direction(of_backward, h, 0);
      } else {
        for (int64_t r = 0; r < s.reads; ++r) {
          const C* mode = x.values + at.modes + r * at.directions;
          slots.scale(x.read + r * stride, mode[s.writes + 1 + h], c1 + r * stride);
          slots.scale(x.read + r * stride, mode[h], c2 + r * stride);
        }
        f1 = c1, f2 = c2;
      }
      link_back<C>(s.N, stride, s.reads,
                   {x.link + h * s.N * stride, w, before, x1, x2, f1, f2, c.link + h * s.N * stride,
                    down, along, dw, d});
      for (int64_t r = 0; r < s.reads; ++r) {
        const int64_t mode = at.modes + r * at.directions, i = r * stride;
        C of_forward = 1, of_backward = 1;
        if (!s.sharpen) {
          of_forward = x.values[mode + s.writes + 1 + h], of_backward = x.values[mode + h];
          dp[mode + s.writes + 1 + h] = product(down + i, x.read + i);
          dp[mode + h] = product(along + i, x.read + i);
        }
        add(of_forward, down + i, dbefore + i);
        add(of_backward, along + i, dbefore + i);
      }
    }
  }

  // From dw to the gates, the content, and the usage that each head sees; and dM of the content.
  void write_heads(const Seen<C>& x, const Carry<C>& c, C* dp) {
    const auto lookup = steps.writes(step, const_cast<C*>(x.norm));
    steps.write_weights(step, x.usage_after, x.memory, const_cast<C*>(x.norm), nullptr);
    zero(dusage, stride);
    for (int64_t h = s.writes - 1; h >= 0; --h) {
      const C gate = x.values[at.allocation + h], write = x.values[at.write + h];
      const C strength = s.softmax ? C(1) + x.values[at.allocation_strengths + h] : C(0);
      const C *u = step.usages + h * stride, *content = step.write_content + h * stride;
      C *one = step.allocation + h * stride, *dw = c.written + h * stride;
      if (h + 1 < s.writes && !s.softmax) slots.allocate(u, strength, step.used, step.sorter, one);
      Vec<C> of_write{}, of_gate{};
      slots.each([&](int64_t i) {
        const Vec<C> d = load(dw + i), a = load(one + i), w = load(content + i);
        const Vec<C> later = load(dusage + i), free = later * (C(1) - load(u + i));
        of_write += d * (gate * a + (C(1) - gate) * w) + free * (gate * a);
        of_gate += d * (write * (a - w)) + free * (write * a);
        store(dallocation + i, (d + free) * (gate * write));
        store(dwrite + h * stride + i, d * (write * (C(1) - gate)));
        store(dusage + i, later * (C(1) - (gate * write) * a));
      });
      dp[at.write + h] = lane_sum<C>(of_write);
      dp[at.allocation + h] = lane_sum<C>(of_gate);
      const C of_strength = reverse.allocate(u, strength, step.used, step.sorter.order, one,
                                             dallocation, products, dusage);
      if (s.softmax) dp[at.allocation_strengths + h] = of_strength;
    }
    reverse.look_up(x.memory, lookup, dwrite, dp + at.write_keys, dp + at.write_strengths,
                    s.masks ? dp + at.write_masks : nullptr, c.memory, scratch);
  }

  // u_t = (u + (1 - u) what) psi; what is left is the gradients of the step before.
  void usage(const Seen<C>& x, const Carry<C>& c, C* dp) {
    const C* free = x.values + at.free;
    slots.each([&](int64_t i) {
      const Vec<C> u = load(x.usage + i), psi = load(step.psi + i);
      const Vec<C> unwritten = slots.unwritten(x.written, i), written = C(1) - unwritten;
      const Vec<C> d = load(c.usage + i) + load(dusage + i);
      store(dpsi + i, load(dpsi + i) + d * (u + (C(1) - u) * written));
      store(c.usage + i, d * psi * unwritten);
      for (int64_t h = 0; h < s.writes; ++h) {
        C* to = c.written + h * stride + i;
        store(to, s.usage_gradient ? d * psi * (C(1) - u) * slots.unwritten(x.written, i, h)
                                   : Vec<C>{});
      }
    });
    for (int64_t r = 0; r < s.reads; ++r) {
      Vec<C> of_free{};
      slots.each([&](int64_t i) {
        const Vec<C> d = load(dpsi + i) * slots.kept(free, x.read, i, r);
        of_free += d * load(x.read + r * stride + i);
        store(c.read + r * stride + i, load(dbefore + r * stride + i) - free[r] * d);
      });
      dp[at.free + r] = -lane_sum<C>(of_free);
    }
  }
};

template <class C>
using Run = BackwardRun<C, BackwardHeads<C>>;

}  // namespace

const Kernel<Backward, Shape> SEQMEM_ISA::backward_kernel =
    Entry<Run, Types::FloatAndDouble, Backward, Shape>::table;

}  // namespace seqmem::dnc
