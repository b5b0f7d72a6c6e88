// Dynamic memory, forward. Formulas: csrc/autograd/dynamic_memory.cpp.
//
//   pack      panels of the weights (s.pack) and of a shared memory M_0 [N, m] (s.tiled)
//   for each block of this thread's rows, which shares the weights while its memories stay in L2:
//     begin   A = 1, B = 0, z_query = W_q query + bias        [block, m_pad], [block, 2 m_pad]
//     for each hop:
//       1  probe = A * score query, attention = softmax(M_0 probe)     one pass over M_0
//       2  u = M_0^T attention                                         a second one, from L2
//       3  read = A * u + B, z = z_query + W_r read, gate, write
//       4  A = (1 - gate) * A, B = (1 - gate) * B + gate * write
//     final   memory = A * M_0 + B, past the caches where it is large
//
// M_0 enters 1 and 2 as tiles of many rows where all rows share it, else row by row, without the
// slots that the mask forbids.
#include "../common/past_caches.h"
#include "dynamic_memory_common.h"
#include "dynamic_memory_kernel.h"

namespace seqmem::dynamic_memory {
namespace {

constexpr int64_t kPastCaches = 4 << 20;  // bytes from which the final memory goes past the caches

template <class S>
class ForwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr bool same = std::is_same_v<S, C>;

  const Shape& s;
  const Forward& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const int64_t m_pad, h_pad, z_pad;  // z: both pre-activations, gate [m_pad] and write [m_pad]
  const int64_t block;                // rows that go through the hops together

  // Shared by all threads.
  SharedMemory<S> shared;
  C *read_panels{}, *query_panels{};
  // This thread's own.
  C *query{}, *score_query{};  // [block, h_pad], [block, m_pad]
  C *scale{}, *shift{};        // A and B, [block, m_pad]
  C *probe{}, *u{}, *read{};   // [block, m_pad]; read takes the place of probe
  C *z{}, *z_query{};          // [block, z_pad]
  C* scores{};                 // [block, N] where the attention is stored in 16 bits

 public:
  ForwardRun(const Shape& s, const Forward& a, int thread, int threads, SpinBarrier& barrier)
      : s(s),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        m_pad(padded<C>(s.m)),
        h_pad(padded<C>(s.h)),
        z_pad(2 * m_pad),
        block(rows_per_block<S>(s, threads)),
        shared(s, a.memory) {}

  int64_t place(char* base) {
    Carver take(base);
    shared.place(take);
    read_panels = take.array<C>(s.pack ? packed_size<C>(s.m, z_pad) : 0);
    query_panels = take.array<C>(s.pack ? packed_size<C>(s.h, z_pad) : 0);
    take.per_thread(thread, threads, [&] {
      query = take.array<C>(block * h_pad);
      for (C** row : {&score_query, &scale, &shift, &probe, &u})
        *row = take.array<C>(block * m_pad);
      read = probe;
      z = take.array<C>(block * z_pad);
      z_query = take.array<C>(block * z_pad);
      scores = take.array<C>(same ? 0 : block * s.N + L);  // read by whole vectors
    });
    return take.used();
  }

  void run() {
    prepare();
    barrier.wait();
    const Share mine = share(s.B, thread, threads);
    for (int64_t first = mine.begin; first < mine.end; first += block) {
      const int64_t rows = min(block, mine.end - first);
      begin_rows(first, rows);
      for (int64_t hop = 0; hop < s.hops; ++hop) run_hop(hop, first, rows);
      if (a.final_memory == nullptr) continue;
      for (int64_t r = 0; r < rows; ++r) write_final(first + r, r);
    }
  }

 private:
  void prepare() {
    shared.pack(thread, threads);
    if (!s.pack) return;
    pack_weights(read_panels, 0, s.m);
    pack_weights(query_panels, s.m, s.h);
  }

  // Columns are the gate's units, padded, then the write network's.
  void pack_weights(C* to, int64_t from, int64_t K) {
    const Share mine = share(z_pad / L, thread, threads);
    for (int64_t v = mine.begin; v < mine.end; ++v) {
      const bool write = v * L >= m_pad;
      const int64_t first = v * L - (write ? m_pad : 0);
      const S* rows = weight_of<S>(a, write) + first * (s.m + s.h) + from;
      pack_transposed(to + v / 4 * K * kPanel<C> + v % 4 * L, kPanel<C>, rows, s.m + s.h,
                      min<int64_t>(L, s.m - first), K);
    }
  }

  // Queries, the identity map, and the queries' share of the pre-activations.
  void begin_rows(int64_t first, int64_t rows) {
    const S* score = static_cast<const S*>(a.score_query == nullptr ? a.query : a.score_query);
    for (int64_t r = 0; r < rows; ++r) {
      load_row(query + r * h_pad, static_cast<const S*>(a.query) + (first + r) * s.h, s.h);
      load_row(score_query + r * m_pad, score + (first + r) * s.m, s.m);
      load_row(z_query + r * z_pad, static_cast<const S*>(a.gate_bias), s.m);
      load_row(z_query + r * z_pad + m_pad, static_cast<const S*>(a.write_bias), s.m);
      for (int64_t i = 0; i < m_pad; i += L) {
        store(scale + r * m_pad + i, splat<C>(1));
        store(shift + r * m_pad + i, Vec<C>{});
      }
    }
    add_product(rows, query, h_pad, query_panels, s.m, s.h, z_query);
  }

  // out += x W^T, for K columns of both weights, from column `from` on.
  void add_product(int64_t rows, const C* x, int64_t stride, const C* panels, int64_t from,
                   int64_t K, C* out) {
    if (s.pack) {
      multiply<C>(rows, z_pad, K, x, stride, 1, packed(panels, K), out, z_pad, true);
      return;
    }
    for (int write = 0; write < 2; ++write)
      dot<C, S>(rows, s.m, K, x, stride, weight_of<S>(a, write) + from, s.m + s.h,
                out + (write ? m_pad : 0), z_pad, true);
  }

  void run_hop(int64_t hop, int64_t first, int64_t rows) {
    S* attention = static_cast<S*>(a.attention) + (hop * s.B + first) * s.N;
    C* weights = same ? reinterpret_cast<C*>(attention) : scores;
    for (int64_t i = 0; i < rows * m_pad; i += L) {
      store(probe + i, load(scale + i) * load(score_query + i));
      store(u + i, Vec<C>{});
    }
    if (s.tiled) {
      shared.dots(rows, probe, m_pad, weights);
      for (int64_t r = 0; r < rows; ++r) softmax<4>(weights + r * s.N, s.N);
      shared.weighted_sums(rows, weights, u, false);
    } else {
      for (int64_t r = 0; r < rows; ++r) attend(first + r, r, weights + r * s.N);
    }
    if constexpr (!same)
      for (int64_t r = 0; r < rows; ++r) store_row(attention + r * s.N, weights + r * s.N, s.N);
    update(hop, first, rows);
  }

  // Attention and u of one row, over the slots that its mask allows.
  void attend(int64_t b, int64_t r, C* weights) {
    const bool* mask = mask_of(s, a, b);
    const S* memory = memory_of<S>(s, a, b);
    if (mask != nullptr)
      for (int64_t n = 0; n < s.N; ++n) weights[n] = -C(1) / C(0);
    for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
      dot<C, S>(1, end - begin, s.m, probe + r * m_pad, m_pad, memory + begin * s.m, s.m,
                weights + begin, s.N, false);
    });
    softmax<4>(weights, s.N);
    clear_masked(mask, s.N, weights);
    for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
      weigh<C, S>(end - begin, s.m, weights + begin, memory + begin * s.m, s.m, u + r * m_pad);
    });
  }

  // The two networks, and the new affine map.
  void update(int64_t hop, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const C filled = attention_sum<C>(mask_of(s, a, first + r), s.N);
      for (int64_t i = r * m_pad; i < (r + 1) * m_pad; i += L)
        store(read + i, load(scale + i) * load(u + i) + filled * load(shift + i));
    }
    for (int64_t i = 0; i < rows * z_pad; i += L) store(z + i, load(z_query + i));
    add_product(rows, read, m_pad, read_panels, 0, s.m, z);
    for (int64_t r = 0; r < rows; ++r) {
      C* saved = a.saved == nullptr
                     ? nullptr
                     : static_cast<C*>(a.saved) + ((hop * s.B + first + r) * 3) * s.m;
      for (int64_t i = 0; i < m_pad; i += L) {
        const Vec<C> argument[2] = {sigmoid_argument<C>(load(z + r * z_pad + i)),
                                    tanh_argument<C>(load(z + r * z_pad + m_pad + i))};
        ExpParts<C> e[2];
        exp_parts<2, C>(argument, e);
        const Vec<C> gate = sigmoid_of<C>(e[0]), write = tanh_of<C>(e[1]), keep = C(1) - gate;
        const int64_t j = r * m_pad + i;
        store(scale + j, keep * load(scale + j));
        store(shift + j, keep * load(shift + j) + gate * write);
        if (saved == nullptr) continue;
        const int n = static_cast<int>(min<int64_t>(L, s.m - i));
        store_n(saved + i, gate, n);
        store_n(saved + s.m + i, write, n);
        store_n(saved + 2 * s.m + i, load(u + j), n);
      }
    }
  }

  void write_final(int64_t b, int64_t r) {
    const S* from = memory_of<S>(s, a, b);
    S* to = static_cast<S*>(a.final_memory) + b * s.N * s.m;
    const C *A = scale + r * m_pad, *B = shift + r * m_pad;
    const bool whole = s.m % L == 0;
    const bool aligned = reinterpret_cast<uintptr_t>(to) % SEQMEM_VEC_BYTES == 0;
    if (whole && same && aligned && s.B * s.N * s.m * int64_t(sizeof(S)) >= kPastCaches) {
      for (int64_t n = 0; n < s.N; ++n, from += s.m, to += s.m)
        for (int64_t i = 0; i < s.m; i += L)
          store_past_caches(to + i, load(A + i) * load(from + i) + load(B + i));
      settle_stores();
      return;
    }
    for (int64_t n = 0; n < s.N; ++n, from += s.m, to += s.m) {
      for (int64_t i = 0; i < s.m; i += L) {
        const int lanes = whole ? L : static_cast<int>(min<int64_t>(L, s.m - i));
        store_n(to + i, load(A + i) * load_n(from + i, lanes) + load(B + i), lanes);
      }
    }
  }
};

}  // namespace

const Kernel<Forward, Shape> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape>::table;

}  // namespace seqmem::dynamic_memory
