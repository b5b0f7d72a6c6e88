// Dynamic memory, backward. Formulas: csrc/autograd/dynamic_memory.cpp.
//
// In three phases with a barrier between them: the final memory's gradient, by slots, since a
// shared memory's gradient sums over rows; the hops in reverse, by rows; and the sums over rows and
// hops, deferred to matrix products, by slots and by units of the two networks.
#include "dynamic_memory_common.h"
#include "dynamic_memory_kernel.h"

namespace seqmem::dynamic_memory {
namespace {

constexpr int64_t kParts = 16;  // shares of the slots whose partial sums are added in order
constexpr int64_t kSlots = 64;  // slots of one deferred product
constexpr int64_t kUnits = 32;  // units of one deferred product
constexpr int64_t kDepth = 64;  // rows of a deferred product packed at once

template <class S>
class BackwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr bool same = std::is_same_v<S, C>;

  const Shape& s;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const int64_t ms, hs;      // padded widths of a slot and of a query
  const int64_t wp, qp, zp;  // strides of rows as wide as a slot, a query, both pre-activations
  const int64_t block;       // rows that go through the hops together

  // Shared by all threads. Rows of hop k and batch row b stand at k * B + b.
  C *slots, *slots_t, *read_w, *query_w;
  C* last_scale;  // [B, ms]: A after the last hop
  C* partial;     // [kParts, B, 2, ms]: shares of the gradients of A and B after the last hop
  C* slot_grad;   // [N, ms]: the final memory's share of a shared memory's gradient
  C* score_grad;  // [hops * B, N]: gradients of the scores
  C* read_grad;   // [hops * B, wp]: of the reads of M_0
  C* probe;       // [hops * B, wp]: A * score query
  C* input;       // [hops * B, wp]: what the networks saw beside the query
  C* z_grad;      // [hops * B, zp]: of both pre-activations, [gate m | write m]
  C* z_sum;       // [B, zp]: of them, over the hops
  C* q;           // [B, qp]
  // This thread's own.
  C *scale, *shift;  // [hops + 1, block, ms]
  C *g_scale, *g_shift, *sq, *g_sq, *work, *g_q, *weights, *out, *columns;

 public:
  BackwardRun(const Shape& s, const Backward& a, int thread, int threads, SpinBarrier& barrier)
      : s(s),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        ms(padded<C>(s.m)),
        hs(padded<C>(s.h)),
        wp(pitch<C>(s.m)),
        qp(pitch<C>(s.h)),
        zp(pitch<C>(2 * s.m)),
        block(min(rows_together<S>(s), max<int64_t>(1, ceil_div(s.B, threads)))) {}

  int64_t place(char* base) {
    Carver take(base);
    const int64_t all = s.hops * s.B;
    slots = take.array<C>(s.tiled && !fit_to_multiply<S>(s) ? packed_size<C>(s.N, s.m) : 0);
    slots_t = take.array<C>(s.tiled ? packed_size<C>(s.m, s.N) : 0);
    read_w = take.array<C>(s.pack ? packed_size<C>(2 * s.m, s.m) : 0);
    query_w = take.array<C>(s.pack ? packed_size<C>(2 * s.m, s.h) : 0);
    last_scale = take.array<C>(s.B * ms);
    partial = take.array<C>(s.shared ? kParts * max<int64_t>(1, s.B) * 2 * ms : 0);
    slot_grad = take.array<C>(s.shared ? s.N * ms : 0);
    score_grad = take.array<C>(all * s.N);
    read_grad = take.array<C>(all * wp);
    probe = take.array<C>(all * wp);
    input = take.array<C>(all * wp);
    z_grad = take.array<C>(all * zp);
    z_sum = take.array<C>(s.B * zp);
    q = take.array<C>(s.B * qp);
    for (int i = 0; i < threads; ++i) {
      C* own[11] = {take.array<C>((s.hops + 1) * block * ms),
                    take.array<C>((s.hops + 1) * block * ms),
                    take.array<C>(block * ms),
                    take.array<C>(block * ms),
                    take.array<C>(block * ms),
                    take.array<C>(block * ms),
                    take.array<C>(block * ms),
                    take.array<C>(block * hs),
                    take.array<C>(same ? 0 : block * s.N),
                    take.array<C>(max(kSlots * ms, kUnits * (ms + hs))),
                    take.array<C>(kDepth * kSlots)};
      if (i != thread) continue;
      scale = own[0], shift = own[1], g_scale = own[2], g_shift = own[3], sq = own[4];
      g_sq = own[5], work = own[6], g_q = own[7], weights = own[8], out = own[9];
      columns = own[10];
    }
    return take.used();
  }

  void run() {
    prepare();
    barrier.wait();
    if (s.shared && a.grad_final != nullptr) {
      const Share parts = share(kParts, thread, threads);
      for (int64_t p = parts.begin; p < parts.end; ++p) final_part(p);
      barrier.wait();
    }
    const Share mine = share(s.B, thread, threads);
    for (int64_t first = mine.begin; first < mine.end; first += block)
      run_rows(first, min(block, mine.end - first));
    barrier.wait();
    if (s.shared && a.grad_memory != nullptr) shared_memory_gradient();
    if (a.grad_gate_weight != nullptr) weight_gradients();
  }

 private:
  const S* memory_of(int64_t b) const {
    return static_cast<const S*>(a.memory) + (s.shared ? 0 : b * s.N * s.m);
  }
  const S* weight(int write) const {
    return static_cast<const S*>(write ? a.write_weight : a.gate_weight);
  }
  const bool* mask_of(int64_t b) const { return a.mask == nullptr ? nullptr : a.mask + b * s.N; }
  int lanes(int64_t i) const { return static_cast<int>(min<int64_t>(L, s.m - i)); }
  bool sums_slots() const { return a.final_strides[1] == 0; }  // one gradient for all slots

  // gate, write or read (0, 1, 2) of the forward.
  Vec<C> saved(int64_t at, int which, int64_t i) const {
    return load_n(static_cast<const C*>(a.saved) + (at * 3 + which) * s.m + i, lanes(i));
  }

  // n values that lie `stride` apart.
  static Vec<C> gather(const S* from, int64_t stride, int n) {
    return stride == 0 ? splat(widen_one(*from)) : load_strided(from, stride, n);
  }
  Vec<C> grad_final(int64_t b, int64_t n, int64_t i) const {
    const int64_t* stride = a.final_strides;
    const S* from = static_cast<const S*>(a.grad_final) + b * stride[0] + n * stride[1];
    return gather(from + i * stride[2], stride[2], lanes(i));
  }

  void prepare() {
    if (s.tiled) {
      const int64_t panels = ceil_div(s.N, kPanel<C>);
      pack_panels_transposed(slots_t, memory_of(0), s.m, s.m, s.N, share(panels, thread, threads));
      if (!fit_to_multiply<S>(s)) {
        const Share mine = share(s.N, thread, threads);
        pack_rows(slots, s.N, mine.begin, memory_of(0) + mine.begin * s.m, s.m,
                  mine.end - mine.begin, s.m);
      }
    }
    if (s.pack) {
      const Share mine = share(s.m, thread, threads);
      const int64_t row = s.m + s.h, count = mine.end - mine.begin;
      for (int write = 0; write < 2; ++write) {
        const int64_t first = (write ? s.m : 0) + mine.begin;
        const S* from = weight(write) + mine.begin * row;
        pack_rows(read_w, 2 * s.m, first, from, row, count, s.m);
        pack_rows(query_w, 2 * s.m, first, from + s.m, row, count, s.h);
      }
    }
    const Share mine = share(s.B, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      load_row(q + b * qp, static_cast<const S*>(a.query) + b * s.h, s.h);
      for (int64_t i = 0; i < ms; i += L) {
        Vec<C> product = splat<C>(1);
        for (int64_t k = 0; k < s.hops; ++k) product *= C(1) - saved(k * s.B + b, 0, i);
        store(last_scale + b * ms + i, product);
      }
    }
  }

  // ---- the final memory M_0 * A + B: its gradient reaches A, B and M_0
  // ---------------------------

  C* partial_of(int64_t part, int64_t b) const { return partial + (part * s.B + b) * 2 * ms; }

  void final_part(int64_t part) {
    const Share mine = share(s.N, static_cast<int>(part), kParts);
    if (sums_slots()) {  // then only the sum of the slots matters
      C* sum = partial + part * ms;
      for (int64_t i = 0; i < ms; i += L) {
        Vec<C> total = {};
        for (int64_t n = mine.begin; n < mine.end; ++n)
          total += load_n(memory_of(0) + n * s.m + i, lanes(i));
        store(sum + i, total);
      }
      return;
    }
    for (int64_t i = 0; i < (mine.end - mine.begin) * ms; i += L)
      store(slot_grad + mine.begin * ms + i, Vec<C>{});
    for (int64_t b = 0; b < s.B; ++b)
      final_row(b, mine, partial_of(part, b), slot_grad + mine.begin * ms);
  }

  // Sums over the slots of `mine` into to[0..ms) for A and to[ms..2ms) for B; adds A * gradient
  // to the rows of slot_out, where given.
  void final_row(int64_t b, Share mine, C* to, C* slot_out) {
    int64_t i = 0;
    if (a.final_strides[2] == 1)
      for (; i + 4 * L <= s.m; i += 4 * L) final_columns<4>(b, i, mine, to, slot_out);
    for (; i < ms; i += L) final_columns<1>(b, i, mine, to, slot_out);
  }

  template <int NV>
  SEQMEM_INLINE void final_columns(int64_t b, int64_t i, Share mine, C* to, C* slot_out) {
    const int64_t* stride = a.final_strides;
    const S* grad = static_cast<const S*>(a.grad_final) + b * stride[0] + i * stride[2];
    const S* from = memory_of(b) + i;
    Vec<C> A[NV], gA[NV] = {}, gB[NV] = {};
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) A[v] = load(last_scale + b * ms + i + v * L);
    for (int64_t n = mine.begin; n < mine.end; ++n) {
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) {
        const int count = NV > 1 ? L : lanes(i);
        const Vec<C> g = NV > 1 ? load(grad + n * stride[1] + v * L)
                                : gather(grad + n * stride[1], stride[2], count);
        gA[v] += g * load_n(from + n * s.m + v * L, count);
        gB[v] += g;
        if (slot_out == nullptr) continue;
        C* slot = slot_out + (n - mine.begin) * ms + i + v * L;
        store(slot, load(slot) + A[v] * g);
      }
    }
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      store(to + i + v * L, gA[v]);
      store(to + ms + i + v * L, gB[v]);
    }
  }

  // Gradients of A and B after the last hop.
  void begin_gradients(int64_t b, C* gA, C* gB) {
    for (int64_t i = 0; i < ms; i += L) {
      Vec<C> A = {}, B = {};
      if (a.grad_final != nullptr && s.shared) {
        for (int64_t p = 0; p < kParts; ++p) {
          const C* part = sums_slots() ? partial + p * ms : partial_of(p, b);
          A += load(part + i);
          if (!sums_slots()) B += load(part + ms + i);
        }
        if (sums_slots()) {
          const Vec<C> g = grad_final(b, 0, i);
          A *= g;
          B = g * C(s.N);
        }
      } else if (a.grad_final != nullptr) {
        A = load(out + i), B = load(out + ms + i);
      }
      store(gA + i, A);
      store(gB + i, B);
    }
  }

  // ---- the hops in reverse
  // -----------------------------------------------------------------------

  void run_rows(int64_t first, int64_t rows) {
    begin_rows(first, rows);
    for (int64_t hop = s.hops - 1; hop >= 0; --hop) {
      const int64_t at = hop * s.B + first;
      const C* A = scale + hop * block * ms;
      through_networks(at, first, rows, A, shift + hop * block * ms);
      through_read(hop, first, rows, A);
    }
    query_gradients(first, rows);
    if (!s.shared && a.grad_memory != nullptr)
      for (int64_t r = 0; r < rows; ++r) own_memory_gradient(first + r);
  }

  // The affine maps of every hop once more, and the gradients of the last.
  void begin_rows(int64_t first, int64_t rows) {
    const S* score = static_cast<const S*>(a.score_query == nullptr ? a.query : a.score_query);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = first + r;
      load_row(sq + r * ms, score + b * s.m, s.m);
      for (int64_t i = 0; i < zp; i += L) store(z_sum + b * zp + i, Vec<C>{});
      for (int64_t i = 0; i < ms; i += L) {
        Vec<C> A = splat<C>(1), B = {};
        store(g_sq + r * ms + i, B);
        for (int64_t k = 0;; ++k) {
          store(scale + (k * block + r) * ms + i, A);
          store(shift + (k * block + r) * ms + i, B);
          if (k == s.hops) break;
          const Vec<C> g = saved(k * s.B + b, 0, i), keep = C(1) - g;
          A = keep * A;
          B = keep * B + g * saved(k * s.B + b, 1, i);
        }
      }
      if (!s.shared && a.grad_final != nullptr) final_row(b, {0, s.N}, out, nullptr);
      begin_gradients(b, g_scale + r * ms, g_shift + r * ms);
    }
  }

  // From the new affine map through gate and write network to the read and its map.
  void through_networks(int64_t at, int64_t first, int64_t rows, const C* scale_in,
                        const C* shift_in) {
    for (int64_t r = 0; r < rows; ++r) {
      C *z = z_grad + (at + r) * zp, *total = z_sum + (first + r) * zp;
      const C filled = attention_sum<C>(mask_of(first + r), s.N);
      for (int64_t i = 0; i < ms; i += L) {
        const int64_t j = r * ms + i;
        const Vec<C> g = saved(at + r, 0, i), w = saved(at + r, 1, i), u = saved(at + r, 2, i);
        const Vec<C> A = load(scale_in + j), B = load(shift_in + j);
        const Vec<C> gA = load(g_scale + j), gB = load(g_shift + j);
        const Vec<C> z_gate = (gB * (w - B) - gA * A) * g * (C(1) - g);
        const Vec<C> z_write = gB * g * (C(1) - w * w);
        store_n(z + i, z_gate, lanes(i));
        store_n(z + s.m + i, z_write, lanes(i));
        store_n(total + i, load_n(total + i, lanes(i)) + z_gate, lanes(i));
        store_n(total + s.m + i, load_n(total + s.m + i, lanes(i)) + z_write, lanes(i));
        store(g_scale + j, gA * (C(1) - g));
        store(g_shift + j, gB * (C(1) - g));
        store(input + (at + r) * wp + i, A * u + filled * B);
        store(work + j, Vec<C>{});
      }
    }
    through_weights(rows, z_grad + at * zp, read_w, 0, s.m, work, ms);
    for (int64_t r = 0; r < rows; ++r) {
      const C filled = attention_sum<C>(mask_of(first + r), s.N);
      for (int64_t i = 0; i < ms; i += L) {
        const int64_t j = r * ms + i;
        const Vec<C> g = load(work + j), A = load(scale_in + j);
        store(g_scale + j, load(g_scale + j) + g * saved(at + r, 2, i));
        store(g_shift + j, load(g_shift + j) + filled * g);
        store(read_grad + (at + r) * wp + i, g * A);
        store(probe + (at + r) * wp + i, A * load(sq + j));
      }
    }
  }

  // to += z W, for the columns from.. of both weights; to begins as zero.
  void through_weights(int64_t rows, const C* z, const C* panels, int64_t from, int64_t width,
                       C* to, int64_t stride) {
    if (s.pack) {
      multiply<C>(rows, padded<C>(width), 2 * s.m, z, zp, 1, packed(panels, 2 * s.m), to, stride,
                  true);
      return;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int write = 0; write < 2; ++write)
        weigh<C, S>(s.m, width, z + r * zp + (write ? s.m : 0), weight(write) + from, s.m + s.h,
                    to + r * stride);
  }

  // From the read and the attention through the softmax to the scores and the map.
  void through_read(int64_t hop, int64_t first, int64_t rows, const C* scale_in) {
    const int64_t at = hop * s.B + first;
    C* scores = score_grad + at * s.N;
    if (s.tiled)
      multiply<C>(rows, s.N, s.m, read_grad + at * wp, wp, 1, packed(slots_t, s.m), scores, s.N,
                  false);
    for (int64_t i = 0; i < rows * ms; i += L) store(work + i, Vec<C>{});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = first + r;
      const bool* mask = mask_of(b);
      const S* memory = memory_of(b);
      C* row = scores + r * s.N;
      if (!s.tiled) {
        for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
          dot<C, S>(1, end - begin, s.m, read_grad + (at + r) * wp, wp, memory + begin * s.m, s.m,
                    row + begin, s.N, false);
        });
      }
      clear_gaps(mask, s.N, row);
      softmax_gradient(row, attention_row(at + r, r), hop, b);
      clear_gaps(mask, s.N, row);
      if (!s.tiled) {
        for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
          weigh<C, S>(end - begin, s.m, row + begin, memory + begin * s.m, s.m, work + r * ms);
        });
      }
    }
    if (s.tiled) {
      const Panels<C> lying = as_it_lies(static_cast<const C*>(a.memory), s.m);
      multiply<C>(rows, ms, s.N, scores, s.N, 1,
                  fit_to_multiply<S>(s) ? lying : packed<C>(slots, s.N), work, ms, true);
    }
    for (int64_t i = 0; i < rows * ms; i += L) {
      const Vec<C> g = load(work + i);
      store(g_scale + i, load(g_scale + i) + g * load(sq + i));
      store(g_sq + i, load(g_sq + i) + g * load(scale_in + i));
    }
  }

  const C* attention_row(int64_t at, int64_t r) {
    const S* from = static_cast<const S*>(a.attention) + at * s.N;
    if constexpr (same) {
      return from;
    } else {
      C* to = weights + r * s.N;
      for (int64_t n = 0; n < s.N; n += L) {
        const int count = static_cast<int>(min<int64_t>(L, s.N - n));
        store_n(to + n, load_n(from + n, count), count);
      }
      return to;
    }
  }

  // row: the gradient of the attention from the read; becomes that of the scores.
  void softmax_gradient(C* row, const C* attention, int64_t hop, int64_t b) {
    const int64_t* stride = a.attention_strides;
    const S* outside = static_cast<const S*>(a.grad_attention);
    if (outside != nullptr) outside += hop * stride[0] + b * stride[1];
    Vec<C> sums[2] = {};
    for (int64_t n = 0; n < s.N; n += L) {
      const int count = static_cast<int>(min<int64_t>(L, s.N - n));
      Vec<C> g = load_n(row + n, count);
      if (outside != nullptr) {
        g += gather(outside + n * stride[2], stride[2], count);
        store_n(row + n, g, count);
      }
      sums[n / L & 1] += g * load_n(attention + n, count);
    }
    const C mean = sum<C>(sums[0] + sums[1]);
    for (int64_t n = 0; n < s.N; n += L) {
      const int count = static_cast<int>(min<int64_t>(L, s.N - n));
      const Vec<C> g = load_n(attention + n, count) * (load_n(row + n, count) - mean);
      store_n(row + n, g, count);
    }
  }

  void query_gradients(int64_t first, int64_t rows) {
    for (int64_t i = 0; i < rows * hs; i += L) store(g_q + i, Vec<C>{});
    if (a.grad_query != nullptr)
      through_weights(rows, z_sum + first * zp, query_w, s.m, s.h, g_q, hs);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = first + r;
      if (a.grad_query != nullptr) {
        C* row = g_q + r * hs;
        if (a.score_query == nullptr)
          for (int64_t i = 0; i < hs; i += L)
            store(row + i, load(row + i) + load(g_sq + r * ms + i));
        store_row(static_cast<S*>(a.grad_query) + b * s.h, row, s.h);
      }
      if (a.grad_score_query != nullptr)
        store_row(static_cast<S*>(a.grad_score_query) + b * s.m, g_sq + r * ms, s.m);
    }
  }

  // ---- sums over rows and hops
  // -------------------------------------------------------------------

  // out[n] = sum over rows at = first, first + step, .. of attention[at][n] * read_grad[at]
  // + score_grad[at][n] * probe[at], for kSlots slots at most.
  void outer_products(int64_t first, int64_t step, int64_t count, int64_t slot, int64_t n) {
    for (int64_t k = 0; k < count || k == 0; k += kDepth) {
      const int64_t depth = min(kDepth, count - k), at = first + k * step;
      for (int scores = 0; scores < 2; ++scores) {
        for (int64_t j = 0; j < depth; ++j) {
          const int64_t row = (at + j * step) * s.N + slot;
          if (scores) {
            copy(columns + j * kSlots, score_grad + row, n);
          } else {
            copy(columns + j * kSlots, static_cast<const S*>(a.attention) + row, n);
          }
        }
        const C* b = (scores ? probe : read_grad) + at * wp;
        multiply<C>(n, ms, depth, columns, 1, kSlots, as_it_lies(b, step * wp), out, ms,
                    scores > 0 || k > 0);
      }
    }
  }
  template <class From>
  static void copy(C* to, const From* from, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
      const int count = static_cast<int>(min<int64_t>(L, n - i));
      store(to + i, load_n(from + i, count));
    }
  }

  void shared_memory_gradient() {
    const bool summed = a.grad_final != nullptr && sums_slots();
    const bool dense = a.grad_final != nullptr && !sums_slots();
    if (summed) {  // the same for every slot
      for (int64_t i = 0; i < ms; i += L) {
        Vec<C> all = {};
        for (int64_t b = 0; b < s.B; ++b)
          all += load(last_scale + b * ms + i) * grad_final(b, 0, i);
        store(work + i, all);
      }
    }
    const Share blocks = share(ceil_div(s.N, kSlots), thread, threads);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t slot = block * kSlots, n = min(kSlots, s.N - slot);
      outer_products(0, 1, s.hops * s.B, slot, n);
      for (int64_t i = 0; i < ms; i += L) {
        const Vec<C> all = summed ? load(work + i) : Vec<C>{};
        for (int64_t j = 0; j < n; ++j) {
          Vec<C> g = load(out + j * ms + i) + all;
          if (dense) g += load(slot_grad + (slot + j) * ms + i);
          store_n(static_cast<S*>(a.grad_memory) + (slot + j) * s.m + i, g, lanes(i));
        }
      }
    }
  }

  void own_memory_gradient(int64_t b) {
    S* to = static_cast<S*>(a.grad_memory) + b * s.N * s.m;
    for (int64_t slot = 0; slot < s.N; slot += kSlots) {
      const int64_t n = min(kSlots, s.N - slot);
      outer_products(b, s.B, s.hops, slot, n);
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < ms; i += L) {
          Vec<C> g = load(out + j * ms + i);
          if (a.grad_final != nullptr)
            g += load(last_scale + b * ms + i) * grad_final(b, slot + j, i);
          store_n(to + (slot + j) * s.m + i, g, lanes(i));
        }
      }
    }
  }

  void weight_gradients() {
    const int64_t blocks = ceil_div(s.m, kUnits);
    const Share mine = share(2 * blocks, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      const bool write = block >= blocks;
      const int64_t unit = block % blocks * kUnits, units = min(kUnits, s.m - unit);
      const int64_t column = (write ? s.m : 0) + unit;
      C *by_read = out, *by_query = out + kUnits * ms;
      multiply<C>(units, ms, s.hops * s.B, z_grad + column, 1, zp, as_it_lies(input, wp), by_read,
                  ms, false);
      multiply<C>(units, hs, s.B, z_sum + column, 1, zp, as_it_lies(q, qp), by_query, hs, false);
      S* weights_to = static_cast<S*>(write ? a.grad_write_weight : a.grad_gate_weight);
      S* bias_to = static_cast<S*>(write ? a.grad_write_bias : a.grad_gate_bias);
      for (int64_t u = 0; u < units; ++u) {
        S* row = weights_to + (unit + u) * (s.m + s.h);
        store_row(row, by_read + u * ms, s.m);
        store_row(row + s.m, by_query + u * hs, s.h);
        C total = 0;
        for (int64_t b = 0; b < s.B; ++b) total += z_sum[b * zp + column + u];
        store_n(bias_to + unit + u, splat(total), 1);
      }
    }
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Backward, Shape> backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::dynamic_memory
