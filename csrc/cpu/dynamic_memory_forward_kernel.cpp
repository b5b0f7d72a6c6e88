// Dynamic memory, forward: all hops of a block of rows, then the final memory in one pass.
#include "../common/past_caches.h"
#include "dynamic_memory_common.h"
#include "dynamic_memory_kernel.h"

namespace seqmem::dynamic_memory {
namespace {

constexpr int64_t kPastCaches = 4 << 20;  // bytes of memory that are written past the caches

template <class S>
class ForwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr bool same = std::is_same_v<S, C>;

  const Shape& s;
  const Forward& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const int64_t ms, hs, zs;  // padded widths of a slot, of a query, of both pre-activations
  const int64_t block;       // rows that go through the hops together

  // Shared by all threads.
  C *slots, *slots_t, *read_t, *query_t;
  // This thread's own, [block] rows each.
  C *q{}, *sq{}, *scale{}, *shift{}, *probe{}, *read{}, *z{}, *z_query{}, *scores{};

 public:
  ForwardRun(const Shape& s, const Forward& a, int thread, int threads, SpinBarrier& barrier)
      : s(s),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        ms(padded<C>(s.m)),
        hs(padded<C>(s.h)),
        zs(2 * ms),
        block(min(rows_together<S>(s), max<int64_t>(1, ceil_div(s.B, threads)))) {}

  // Places all buffers; returns the bytes used. Called with a null base to size them.
  int64_t place(char* base) {
    Carver take(base);
    const bool copied = s.tiled && !fit_to_multiply<S>(s);
    slots = take.array<C>(copied ? packed_size<C>(s.N, s.m) : 0);
    slots_t = take.array<C>(s.tiled ? packed_size<C>(s.m, s.N) : 0);
    read_t = take.array<C>(s.pack ? packed_size<C>(s.m, zs) : 0);
    query_t = take.array<C>(s.pack ? packed_size<C>(s.h, zs) : 0);
    for (int i = 0; i < threads; ++i) {
      C* own[9] = {take.array<C>(block * hs),
                   take.array<C>(block * ms),
                   take.array<C>(block * ms),
                   take.array<C>(block * ms),
                   take.array<C>(block * ms),
                   take.array<C>(block * ms),
                   take.array<C>(block * zs),
                   take.array<C>(block * zs),
                   take.array<C>(same ? 0 : block * s.N + L)};  // read by whole vectors
      if (i != thread) continue;
      q = own[0], sq = own[1], scale = own[2], shift = own[3], probe = own[4], read = own[5];
      z = own[6], z_query = own[7], scores = own[8];
    }
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
  const S* memory_of(int64_t b) const {
    return static_cast<const S*>(a.memory) + (s.shared ? 0 : b * s.N * s.m);
  }
  const S* weight(int write) const {
    return static_cast<const S*>(write ? a.write_weight : a.gate_weight);
  }
  const bool* mask_of(int64_t b) const { return a.mask == nullptr ? nullptr : a.mask + b * s.N; }

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
      pack_weights(read_t, 0, s.m);
      pack_weights(query_t, s.m, s.h);
    }
  }

  // Columns are the gate's units, padded to ms, then the write network's.
  void pack_weights(C* to, int64_t from, int64_t K) {
    const Share mine = share(zs / L, thread, threads);
    for (int64_t v = mine.begin; v < mine.end; ++v) {
      const bool write = v * L >= ms;
      const int64_t first = v * L - (write ? ms : 0);
      const S* rows = weight(write) + first * (s.m + s.h) + from;
      pack_transposed(to + v / 4 * K * kPanel<C> + v % 4 * L, kPanel<C>, rows, s.m + s.h,
                      min<int64_t>(L, s.m - first), K);
    }
  }

  // Queries, the identity map, and the queries' share of the pre-activations.
  void begin_rows(int64_t first, int64_t rows) {
    const S* score = static_cast<const S*>(a.score_query == nullptr ? a.query : a.score_query);
    for (int64_t r = 0; r < rows; ++r) {
      load_row(q + r * hs, static_cast<const S*>(a.query) + (first + r) * s.h, s.h);
      load_row(sq + r * ms, score + (first + r) * s.m, s.m);
      load_row(z_query + r * zs, static_cast<const S*>(a.gate_bias), s.m);
      load_row(z_query + r * zs + ms, static_cast<const S*>(a.write_bias), s.m);
      for (int64_t i = 0; i < ms; i += L) {
        store(scale + r * ms + i, splat<C>(1));
        store(shift + r * ms + i, Vec<C>{});
      }
    }
    add_product(rows, q, hs, query_t, s.m, s.h, z_query);
  }

  // out += x W^T, for the columns from.. of both weights.
  void add_product(int64_t rows, const C* x, int64_t stride, const C* panels, int64_t from,
                   int64_t K, C* out) {
    if (s.pack) {
      multiply<C>(rows, zs, K, x, stride, 1, packed(panels, K), out, zs, true);
      return;
    }
    for (int write = 0; write < 2; ++write)
      dot<C, S>(rows, s.m, K, x, stride, weight(write) + from, s.m + s.h, out + (write ? ms : 0),
                zs, true);
  }

  void run_hop(int64_t hop, int64_t first, int64_t rows) {
    S* attention = static_cast<S*>(a.attention) + (hop * s.B + first) * s.N;
    C* weights = same ? reinterpret_cast<C*>(attention) : scores;
    for (int64_t i = 0; i < rows * ms; i += L) {
      store(probe + i, load(scale + i) * load(sq + i));
      store(read + i, Vec<C>{});
    }
    if (s.tiled) {
      multiply<C>(rows, s.N, s.m, probe, ms, 1, packed(slots_t, s.m), weights, s.N, false);
      for (int64_t r = 0; r < rows; ++r) softmax<4>(weights + r * s.N, s.N);
      const Panels<C> lying = as_it_lies(static_cast<const C*>(a.memory), s.m);
      multiply<C>(rows, ms, s.N, weights, s.N, 1,
                  fit_to_multiply<S>(s) ? lying : packed<C>(slots, s.N), read, ms, false);
    } else {
      for (int64_t r = 0; r < rows; ++r) read_one(first + r, r, weights + r * s.N);
    }
    if constexpr (!same)
      for (int64_t r = 0; r < rows; ++r) store_row(attention + r * s.N, weights + r * s.N, s.N);
    update(hop, first, rows);
  }

  // Attention and read of one row, over the slots that its mask leaves.
  void read_one(int64_t b, int64_t r, C* weights) {
    const bool* mask = mask_of(b);
    const S* memory = memory_of(b);
    if (mask != nullptr)
      for (int64_t n = 0; n < s.N; ++n) weights[n] = -C(1) / C(0);
    for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
      dot<C, S>(1, end - begin, s.m, probe + r * ms, ms, memory + begin * s.m, s.m, weights + begin,
                s.N, false);
    });
    softmax<4>(weights, s.N);
    clear_gaps(mask, s.N, weights);
    for_runs(mask, s.N, [&](int64_t begin, int64_t end) {
      weigh<C, S>(end - begin, s.m, weights + begin, memory + begin * s.m, s.m, read + r * ms);
    });
  }

  // The two networks, and the new affine map.
  void update(int64_t hop, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const C filled = attention_sum<C>(mask_of(first + r), s.N);
      for (int64_t i = r * ms; i < (r + 1) * ms; i += L)
        store(probe + i, load(scale + i) * load(read + i) + filled * load(shift + i));
    }
    for (int64_t i = 0; i < rows * zs; i += L) store(z + i, load(z_query + i));
    add_product(rows, probe, ms, read_t, 0, s.m, z);
    for (int64_t r = 0; r < rows; ++r) {
      C* saved = a.saved == nullptr
                     ? nullptr
                     : static_cast<C*>(a.saved) + ((hop * s.B + first + r) * 3) * s.m;
      for (int64_t i = 0; i < ms; i += L) {
        const Vec<C> argument[2] = {sigmoid_argument<C>(load(z + r * zs + i)),
                                    tanh_argument<C>(load(z + r * zs + ms + i))};
        ExpParts<C> e[2];
        exp_parts<2, C>(argument, e);
        const Vec<C> gate = sigmoid_of<C>(e[0]), write = tanh_of<C>(e[1]), keep = C(1) - gate;
        const int64_t at = r * ms + i;
        store(scale + at, keep * load(scale + at));
        store(shift + at, keep * load(shift + at) + gate * write);
        if (saved == nullptr) continue;
        const int n = static_cast<int>(min<int64_t>(L, s.m - i));
        store_n(saved + i, gate, n);
        store_n(saved + s.m + i, write, n);
        store_n(saved + 2 * s.m + i, load(read + at), n);
      }
    }
  }

  void write_final(int64_t b, int64_t r) {
    const S* from = memory_of(b);
    S* to = static_cast<S*>(a.final_memory) + b * s.N * s.m;
    const C *A = scale + r * ms, *B = shift + r * ms;
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

namespace SEQMEM_ISA {
const Kernel<Forward, Shape> forward_kernel = Entry<ForwardRun, Types::All, Forward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::dynamic_memory
