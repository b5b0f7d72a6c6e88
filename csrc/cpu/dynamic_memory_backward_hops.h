// Dynamic memory, backward, phase 2: the hops in reverse, for a block of rows.
//
//   recompute  A, B of every hop from the saved gates and writes           [hops + 1, block, m_pad]
//   for each hop, from the last one:
//     1  dz from dA, dB; then dA, dB of the hop before                     as in the formulas
//     2  dread = dz W_r                            weights packed, or streamed once for each row
//     3  dA += dread * u, dB += dread, du = dread * A
//     4  dattention = given + M_0 du, dscores = softmax's gradient         one pass over M_0
//     5  dprobe = M_0^T dscores                                            a second one, from L2
//     6  dA += dprobe * score query, dscore query += dprobe * A
//   dquery = (sum of dz over the hops) W_q, and the score query's share
//
// dz, du, dscores, probe and read of every hop and row are kept for phase 3, where they become the
// gradients of the weights and of M_0.
#pragma once

#include "dynamic_memory_backward_final.h"

namespace seqmem::dynamic_memory {
namespace {

// What the hops leave to phase 3. Rows of hop k and batch row b are at k * B + b.
template <class C>
struct HopRecords {
  const int64_t slot_stride, query_stride, z_stride;
  C* score_grad;  // [hops * B, N]
  C* u_grad;      // [hops * B, slot_stride]: du, of the reads of M_0
  C* probe;       // [hops * B, slot_stride]: A * score query
  C* read;        // [hops * B, slot_stride]: the networks' input beside the query
  C* z_grad;      // [hops * B, z_stride]: of both pre-activations, [gate m | write m]
  C* z_sum;       // [B, z_stride]: z_grad summed over the hops
  C* query;       // [B, query_stride]

  explicit HopRecords(const Shape& s)
      : slot_stride(row_stride<C>(s.m)),
        query_stride(row_stride<C>(s.h)),
        z_stride(row_stride<C>(2 * s.m)) {}

  void place(Carver& take, const Shape& s) {
    const int64_t all = s.hops * s.B;
    score_grad = take.array<C>(all * s.N);
    u_grad = take.array<C>(all * slot_stride);
    probe = take.array<C>(all * slot_stride);
    read = take.array<C>(all * slot_stride);
    z_grad = take.array<C>(all * z_stride);
    z_sum = take.array<C>(s.B * z_stride);
    query = take.array<C>(s.B * query_stride);
  }
};

template <class S>
class HopGradients {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr bool same = std::is_same_v<S, C>;

  const Shape& s;
  const Backward& a;
  FinalGradient<S>& last;
  HopRecords<C>& records;
  const int64_t m_pad, h_pad;

  // Shared by all threads: panels of the weights' columns.
  SharedMemory<S> shared;
  C *read_panels, *query_panels;
  // This thread's own.
  C *scale, *shift;                                 // A and B, [hops + 1, block, m_pad]
  C *grad_scale, *grad_shift, *grad_score, *score;  // [block, m_pad], as the next
  C* product;                                       // dread, then dprobe
  C* grad_query;                                    // [block, h_pad]
  C* attention;                                     // [block, N] where it is stored in 16 bits

 public:
  const int64_t block;  // rows that go through the hops together

  HopGradients(const Shape& s, const Backward& a, FinalGradient<S>& last, HopRecords<C>& records,
               int threads)
      : s(s),
        a(a),
        last(last),
        records(records),
        m_pad(padded<C>(s.m)),
        h_pad(padded<C>(s.h)),
        shared(s, a.memory),
        block(rows_per_block<S>(s, threads)) {}

  void place(Carver& take, int thread, int threads) {
    shared.place(take);
    read_panels = take.array<C>(s.pack ? packed_size<C>(2 * s.m, s.m) : 0);
    query_panels = take.array<C>(s.pack ? packed_size<C>(2 * s.m, s.h) : 0);
    take.per_thread(thread, threads, [&] {
      scale = take.array<C>((s.hops + 1) * block * m_pad);
      shift = take.array<C>((s.hops + 1) * block * m_pad);
      for (C** rows : {&grad_scale, &grad_shift, &grad_score, &score, &product})
        *rows = take.array<C>(block * m_pad);
      grad_query = take.array<C>(block * h_pad);
      attention = take.array<C>(same ? 0 : block * s.N);
    });
  }

  // One thread's share of the panels.
  void pack(int thread, int threads) {
    shared.pack(thread, threads);
    if (!s.pack) return;
    const Share mine = share(s.m, thread, threads);
    const int64_t row = s.m + s.h, count = mine.end - mine.begin;
    for (int write = 0; write < 2; ++write) {
      const int64_t first = (write ? s.m : 0) + mine.begin;
      const S* from = weight_of<S>(a, write) + mine.begin * row;
      pack_rows(read_panels, 2 * s.m, first, from, row, count, s.m);
      pack_rows(query_panels, 2 * s.m, first, from + s.m, row, count, s.h);
    }
  }

  void run(int64_t first, int64_t rows) {
    begin_rows(first, rows);
    for (int64_t hop = s.hops - 1; hop >= 0; --hop) {
      const C* A = scale + hop * block * m_pad;
      through_networks(hop * s.B + first, first, rows, A, shift + hop * block * m_pad);
      through_read(hop, first, rows, A);
    }
    query_gradients(first, rows);
  }

 private:
  int lanes(int64_t i) const { return lanes_at<C>(s.m, i); }
  // Gate, write or read of M_0 (0, 1, 2) of the forward.
  Vec<C> saved(int64_t record, int which, int64_t i) const {
    return saved_of<S>(s, a, record, which, i);
  }

  // The affine maps of every hop recomputed, and the gradients of the last.
  void begin_rows(int64_t first, int64_t rows) {
    const S* from = static_cast<const S*>(a.score_query == nullptr ? a.query : a.score_query);
    const int64_t z_stride = records.z_stride;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = first + r;
      load_row(score + r * m_pad, from + b * s.m, s.m);
      for (int64_t i = 0; i < z_stride; i += L) store(records.z_sum + b * z_stride + i, Vec<C>{});
      for (int64_t i = 0; i < m_pad; i += L) {
        Vec<C> A = splat<C>(1), B = {};
        store(grad_score + r * m_pad + i, B);
        for (int64_t k = 0;; ++k) {
          store(scale + (k * block + r) * m_pad + i, A);
          store(shift + (k * block + r) * m_pad + i, B);
          if (k == s.hops) break;
          const Vec<C> g = saved(k * s.B + b, 0, i), keep = C(1) - g;
          A = keep * A;
          B = keep * B + g * saved(k * s.B + b, 1, i);
        }
      }
      last.begin_row(b, grad_scale + r * m_pad, grad_shift + r * m_pad);
    }
  }

  // 1 to 3: from the new affine map through the gate and write networks to the read and its map.
  void through_networks(int64_t record, int64_t first, int64_t rows, const C* scale_in,
                        const C* shift_in) {
    const int64_t z_stride = records.z_stride, slot_stride = records.slot_stride;
    for (int64_t r = 0; r < rows; ++r) {
      C* z = records.z_grad + (record + r) * z_stride;
      C* total = records.z_sum + (first + r) * z_stride;
      C* read = records.read + (record + r) * slot_stride;
      const C filled = attention_sum<C>(mask_of(s, a, first + r), s.N);
      for (int64_t i = 0; i < m_pad; i += L) {
        const int64_t j = r * m_pad + i;
        const Vec<C> g = saved(record + r, 0, i), w = saved(record + r, 1, i);
        const Vec<C> u = saved(record + r, 2, i);
        const Vec<C> A = load(scale_in + j), B = load(shift_in + j);
        const Vec<C> dA = load(grad_scale + j), dB = load(grad_shift + j);
        const Vec<C> z_gate = (dB * (w - B) - dA * A) * g * (C(1) - g);
        const Vec<C> z_write = dB * g * (C(1) - w * w);
        store_n(z + i, z_gate, lanes(i));
        store_n(z + s.m + i, z_write, lanes(i));
        store_n(total + i, load_n(total + i, lanes(i)) + z_gate, lanes(i));
        store_n(total + s.m + i, load_n(total + s.m + i, lanes(i)) + z_write, lanes(i));
        store(grad_scale + j, dA * (C(1) - g));
        store(grad_shift + j, dB * (C(1) - g));
        store(read + i, A * u + filled * B);
        store(product + j, Vec<C>{});
      }
    }
    add_product(rows, records.z_grad + record * z_stride, read_panels, 0, s.m, product, m_pad);
    for (int64_t r = 0; r < rows; ++r) {
      const C filled = attention_sum<C>(mask_of(s, a, first + r), s.N);
      for (int64_t i = 0; i < m_pad; i += L) {
        const int64_t j = r * m_pad + i;
        const Vec<C> g = load(product + j), A = load(scale_in + j);
        store(grad_scale + j, load(grad_scale + j) + g * saved(record + r, 2, i));
        store(grad_shift + j, load(grad_shift + j) + filled * g);
        store(records.u_grad + (record + r) * slot_stride + i, g * A);
        store(records.probe + (record + r) * slot_stride + i, A * load(score + j));
      }
    }
  }

  // to += z W, for `width` columns of both weights, from column `from` on.
  void add_product(int64_t rows, const C* z, const C* panels, int64_t from, int64_t width, C* to,
                   int64_t stride) {
    if (s.pack) {
      multiply<C>(rows, padded<C>(width), 2 * s.m, z, records.z_stride, 1, packed(panels, 2 * s.m),
                  to, stride, true);
      return;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int write = 0; write < 2; ++write)
        weigh<C, S>(s.m, width, z + r * records.z_stride + (write ? s.m : 0),
                    weight_of<S>(a, write) + from, s.m + s.h, to + r * stride);
  }

  // 4 to 6: from the read and the attention through the softmax to the scores and the map.
  void through_read(int64_t hop, int64_t first, int64_t rows, const C* scale_in) {
    const int64_t record = hop * s.B + first, slot_stride = records.slot_stride;
    const C* u_grad = records.u_grad + record * slot_stride;
    C* scores = records.score_grad + record * s.N;
    if (s.tiled) shared.dots(rows, u_grad, slot_stride, scores);
    for (int64_t i = 0; i < rows * m_pad; i += L) store(product + i, Vec<C>{});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = first + r;
      const bool* mask = mask_of(s, a, b);
      const S* memory = memory_of<S>(s, a, b);
      C* row = scores + r * s.N;
      if (!s.tiled) {
        for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
          dot<C, S>(1, end - begin, s.m, u_grad + r * slot_stride, slot_stride,
                    memory + begin * s.m, s.m, row + begin, s.N, false);
        });
      }
      clear_masked(mask, s.N, row);
      softmax_gradient(row, attention_of(record + r, r), hop, b);
      clear_masked(mask, s.N, row);
      if (!s.tiled) {
        for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
          weigh<C, S>(end - begin, s.m, row + begin, memory + begin * s.m, s.m,
                      product + r * m_pad);
        });
      }
    }
    if (s.tiled) shared.weighted_sums(rows, scores, product, true);
    for (int64_t i = 0; i < rows * m_pad; i += L) {
      const Vec<C> g = load(product + i);
      store(grad_scale + i, load(grad_scale + i) + g * load(score + i));
      store(grad_score + i, load(grad_score + i) + g * load(scale_in + i));
    }
  }

  const C* attention_of(int64_t record, int64_t r) {
    const S* from = static_cast<const S*>(a.attention) + record * s.N;
    if constexpr (same) {
      return from;
    } else {
      C* to = attention + r * s.N;
      for (int64_t n = 0; n < s.N; n += L) {
        const int count = lanes_at<C>(s.N, n);
        store_n(to + n, load_n(from + n, count), count);
      }
      return to;
    }
  }

  // row: the gradient of the attention from the read; becomes that of the scores.
  void softmax_gradient(C* row, const C* attention, int64_t hop, int64_t b) {
    const int64_t* stride = a.attention_strides;
    const S* given = static_cast<const S*>(a.grad_attention);
    if (given != nullptr) given += hop * stride[0] + b * stride[1];
    Vec<C> sums[2] = {};
    for (int64_t n = 0; n < s.N; n += L) {
      const int count = lanes_at<C>(s.N, n);
      Vec<C> g = load_n(row + n, count);
      if (given != nullptr) {
        g += gather(given + n * stride[2], stride[2], count);
        store_n(row + n, g, count);
      }
      sums[n / L & 1] += g * load_n(attention + n, count);
    }
    const C mean = lane_sum<C>(sums[0] + sums[1]);
    for (int64_t n = 0; n < s.N; n += L) {
      const int count = lanes_at<C>(s.N, n);
      const Vec<C> g = load_n(attention + n, count) * (load_n(row + n, count) - mean);
      store_n(row + n, g, count);
    }
  }

  void query_gradients(int64_t first, int64_t rows) {
    for (int64_t i = 0; i < rows * h_pad; i += L) store(grad_query + i, Vec<C>{});
    if (a.grad_query != nullptr)
      add_product(rows, records.z_sum + first * records.z_stride, query_panels, s.m, s.h,
                  grad_query, h_pad);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = first + r;
      if (a.grad_query != nullptr) {
        C* row = grad_query + r * h_pad;
        if (a.score_query == nullptr)
          for (int64_t i = 0; i < h_pad; i += L)
            store(row + i, load(row + i) + load(grad_score + r * m_pad + i));
        store_row(static_cast<S*>(a.grad_query) + b * s.h, row, s.h);
      }
      if (a.grad_score_query != nullptr)
        store_row(static_cast<S*>(a.grad_score_query) + b * s.m, grad_score + r * m_pad, s.m);
    }
  }
};

}  // namespace
}  // namespace seqmem::dynamic_memory
