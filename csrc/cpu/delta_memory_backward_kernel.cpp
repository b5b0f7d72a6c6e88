// The delta memory backwards. A thread takes heads, or slices of V of a head; dS [K, V] is the
// gradient of the memory. For each segment, from the last to the first
//   the memories at which its runs of at most 16 steps begin are computed from the kept one, by
//   the x that were kept with it
//   for each run, from the last to the first, with the letters of delta_memory_chunk.h:
//     du = A^T do + (F k) dS;  for i = n-1..0:  dx_i = beta_i du_i,  du_j -= M_ij dx_i for j < i
//     dbeta_i = du_i . x_i,  dv = dx,  dA = do u^T,  dM = -dx u^T
//     d(E q) = do S^T,  d(E k) = -dx S^T,  d(F k) = u dS^T,  dE_n = sum_v S dS
//     dS = E_n dS + (E q)^T do - (E k)^T dx
//   and from these the gradients of q, k and the decays (delta_memory_gradients.h), term by term
//   (none is a difference of sums that nearly cancel)
// Floor: B H T K V 6 multiply-adds, and some 16 (3 K + 2 V) for each step; one more where a segment
// has many runs. Bytes: inputs, gradients, kept memories and x once.
#include "delta_memory_gradients.h"

namespace seqmem::delta_memory {
namespace {

template <class S>
class BackwardRun {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>, N = kChunk;

  const Shape& s;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const int64_t vectors, Vp;  // of V; the widest slice
  Chunk<S> chunk;
  KeyGradients<S> keys;
  const int64_t Kp;
  const bool by_feature;
  Run* runs;              // [segment]
  C* memories;            // [segment / N, K, Vp]: where runs begin
  const C* first_memory;  // where the segment begins: the kept one, in its place if it can be
  C* nothing;             // [K, Vp] zeros
  C* grad_memories;       // of each unit at work: dS [K, Vp]
  C* grad_memory;         // of the present one
  C* transposed;          // d(E q)^T and -d(E k)^T [K, 2 N], or d(F k)^T [K, N]
  C* given;               // [2 n, Vp]: do, then -dx
  C* grad_u;              // [N, Vp]

 public:
  BackwardRun(const Shape& shape, const Backward& arguments, int thread_, int threads_,
              SpinBarrier& b)
      : s(shape),
        a(arguments),
        thread(thread_),
        threads(threads_),
        barrier(b),
        vectors(ceil_div(shape.V, L)),
        Vp(max<int64_t>(ceil_div(vectors, shape.slices), 1) * L),
        chunk(shape, Vp),
        keys(shape, arguments, chunk),
        Kp(chunk.Kp),
        by_feature(shape.decay == Decay::Feature) {}

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      chunk.place(take);
      runs = take.array<Run>(s.segment);
      memories = take.array<C>(s.segment / N * s.K * Vp);
      nothing = take.array<C>(s.reset == nullptr ? 0 : s.K * Vp);
      grad_memories = take.array<C>(min(s.H * s.slices, together<C>(s.K * Vp)) * s.K * Vp);
      transposed = take.array<C>(2 * N * Kp);
      given = take.array<C>(2 * N * Vp);
      grad_u = take.array<C>(N * Vp);
      keys.place(take);
    });
    return take.used();
  }

  void run() {
    if (s.reset != nullptr) fill(nothing, s.K * Vp);
    const Share mine = share(s.B * s.H * s.slices, thread, threads);
    for (int64_t u = mine.begin; u < mine.end;) {
      const int64_t b = u / s.slices / s.H, row_ends = (b + 1) * s.H * s.slices;
      const int64_t count = min(together<C>(s.K * Vp), min(mine.end, row_ends) - u);
      run_units(b, u, count);
      u += count;
    }
    if (a.parts_q == nullptr) return;
    barrier.wait();
    const Share rows = share(s.B * s.T * s.Hk, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; ++row) keys.add_parts(row);
  }

 private:
  // ---- a slice of a head's values

  struct Unit {
    int64_t head, h, slice;
    int64_t first, width;  // columns of V
    int64_t matrix;        // where its part of a memory [B, H, K, V] begins
  };

  Unit unit(int64_t u) const {
    const int64_t head = u / s.slices, slice = u % s.slices;
    const int64_t first = vectors * slice / s.slices * L;
    const int64_t width = min(s.V, vectors * (slice + 1) / s.slices * L) - first;
    return {head, head % s.H, slice, first, width, head * s.K * s.V + first};
  }

  // Slices of heads of one batch row.
  void run_units(int64_t b, int64_t begin, int64_t count) {
    const int64_t end = steps_of(s, b);
    auto for_units = [&](auto&& f) {
      for (int64_t k = 0; k < count; ++k) {
        grad_memory = grad_memories + k * s.K * Vp;
        f(unit(begin + k));
      }
    };
    for_units(
        [&](const Unit& u) { load_matrix(grad_memory, at(a.grad_final, u.matrix), u.width); });
    for (int64_t segment = ceil_div(end, s.segment) - 1; segment >= 0; --segment)
      for_units([&](const Unit& u) { run_segment(b, u, segment, end); });
    for_units([&](const Unit& u) {
      C* to = static_cast<C*>(a.grad_state) + u.matrix;
      for (int64_t i = 0; i < s.K; ++i) store_row<C>(to + i * s.V, grad_memory + i * Vp, u.width);
      leave_zeros(b, u.h, end, u.first, u.width);
    });
  }

  void run_segment(int64_t b, const Unit& u, int64_t segment, int64_t end) {
    const int64_t begin = segment * s.segment, stop = min(end, begin + s.segment);
    int64_t count = 0;
    for (int64_t t = begin; t < stop; t += runs[count++].steps)
      runs[count] = run_from(s, b, t, stop);
    const int64_t kept = (u.head * s.segments() + segment) * s.kept_rows() * s.V + u.first;
    first_memory = static_cast<const C*>(a.states) + kept;
    const C* first_rest = first_memory + s.K * s.V;  // x of the segment's first step
    auto read = [&](const Run& run) {
      chunk.read(a, b, u.h, run, first_rest + (run.begin - begin) * s.V, u.width);
    };
    if (Vp != s.V) {
      load_matrix(memories, first_memory, u.width);
      first_memory = memories;
    }
    for (int64_t r = 0; r + 1 < count; ++r) {
      if (runs[r + 1].anew) continue;
      read(runs[r]);
      chunk.advance(memory_of(r, begin), computed(r + 1, begin));
    }
    for (int64_t r = count - 1; r >= 0; --r) {
      read(runs[r]);
      chunk.find_scores();
      take_back(b, u.h, u.slice, runs[r], memory_of(r, begin), u.first, u.width);
    }
  }

  const C* memory_of(int64_t r, int64_t begin) const {
    if (runs[r].anew) return nothing;
    return runs[r].begin == begin ? first_memory : computed(r, begin);
  }

  // Where the memory at the beginning of a run goes.
  C* computed(int64_t r, int64_t begin) const {
    return memories + (runs[r].begin - begin) / N * s.K * Vp;
  }

  static const C* at(const void* data, int64_t offset) {
    return data == nullptr ? nullptr : static_cast<const C*>(data) + offset;
  }

  void load_matrix(C* to, const C* from, int64_t width) const {
    for (int64_t i = 0; i < s.K; ++i) {
      for (int64_t w = 0; w < Vp; w += L) {
        const int n = static_cast<int>(max<int64_t>(width - w, 0));
        store(to + i * Vp + w, from == nullptr ? Vec<C>{} : load_n(from + i * s.V + w, n));
      }
    }
  }

  S* value_row(int64_t b, int64_t t, int64_t h) const {
    return static_cast<S*>(a.grad_v) + ((b * s.T + t) * s.H + h) * s.V;
  }
  int64_t key_row(int64_t b, int64_t t, int64_t h) const {
    return ((b * s.T + t) * s.Hk + h) * s.K;
  }

  // Of the steps after a row's end.
  void leave_zeros(int64_t b, int64_t h, int64_t end, int64_t first, int64_t width) const {
    for (int64_t t = end; t < s.T; ++t) {
      for (int64_t w = 0; w < width; ++w) value_row(b, t, h)[first + w] = S{};
      if (a.parts_q != nullptr) continue;
      for (int64_t c = 0; c < s.K; ++c)
        static_cast<S*>(a.grad_q)[key_row(b, t, h) + c] =
            static_cast<S*>(a.grad_k)[key_row(b, t, h) + c] = S{};
    }
  }

  // ---- a run

  // to [count, Kp] = the transpose of a matrix [K, count] whose rows are `stride` apart.
  void transpose_into(C* to, const C* matrix, int64_t stride, int64_t count) const {
    for (int64_t i = 0; i < s.K; i += L)
      pack_transposed(to + i, Kp, matrix + i * stride, stride, min(L, s.K - i), count);
  }

  void take_back(int64_t b, int64_t h, int64_t slice, const Run& run, const C* memory,
                 int64_t first, int64_t width) {
    const int64_t n = run.steps;
    C* grad_x = given + n * Vp;  // -dx
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = run.begin + i;
      const bool zero = a.grad_output.data == nullptr;
      if (!zero && h + 1 < s.H)
        Steps<S>::ask_for(Steps<S>::row(a.grad_output, b, t, h + 1) + first, width);
      for (int64_t w = 0; w < Vp; w += L) {
        const int count = static_cast<int>(max<int64_t>(width - w, 0));
        store(given + i * Vp + w,
              zero ? Vec<C>{} : load_n(Steps<S>::row(a.grad_output, b, t, h) + first + w, count));
      }
    }
    matrix_multiply<false>(n, s.K, Vp, chunk.late, Kp, grad_memory, Vp, grad_u, false);
    matrix_multiply<true>(n, n, Vp, chunk.scores, N, given, Vp, grad_u, true);
    C* of_beta = static_cast<C*>(a.grad_beta) + slice * s.B * s.T * s.H;
    for (int64_t i = n - 1; i >= 0; --i) {
      Vec<C> product = {};
      for (int64_t w = 0; w < Vp; w += L) {
        Vec<C> du = load(grad_u + i * Vp + w);
        for (int64_t j = i + 1; j < n; ++j) du += chunk.M(j, i) * load(grad_x + j * Vp + w);
        product += du * load(chunk.x + i * Vp + w);
        store(grad_x + i * Vp + w, -chunk.steps.beta[i] * du);
      }
      of_beta[(b * s.T + run.begin + i) * s.H + h] = lane_sum<C>(product);
      S* of_value = value_row(b, run.begin + i, h) + first;
      for (int64_t w = 0; w < width; w += L)
        store_n(of_value + w, -load(grad_x + i * Vp + w), static_cast<int>(width - w));
    }
    chunk.lay_columns(chunk.u, Vp, width);
    matrix_multiply<false>(n, width, N, given, Vp, chunk.columns, N, keys.scores, false);
    matrix_multiply<false>(n, width, N, grad_x, Vp, chunk.columns, N, keys.scores + N * N, false);
    matrix_multiply<false>(s.K, width, N, grad_memory, Vp, chunk.columns, N, transposed, false);
    transpose_into(keys.of_late, transposed, N, n);
    chunk.lay_columns(given, Vp, width, 2 * n, 2 * N);
    matrix_multiply<false>(s.K, width, 2 * N, memory, Vp, chunk.columns, 2 * N, transposed, false);
    transpose_into(keys.of_early, transposed, 2 * N, 2 * n);
    if (run.anew) {
      fill(grad_memory, s.K * Vp);
      fill(keys.whole, Kp);
    } else {
      hand_back(memory);
    }
    keys.leave(b, h, slice, run);
  }

  // dS of the step before the run, and keys.whole.
  void hand_back(const C* memory) {
    Vec<C> total = {};
    fill(keys.whole, Kp);
    auto decayed = [&](int64_t i, int64_t c, auto& sums) {
      const C decay = chunk.whole(i);
      const C *grad = grad_memory + i * Vp + c, *row = memory + i * Vp + c;
      Vec<C> products = {};
      for (auto& sum : sums) {
        sum = decay * load(grad);
        products += sum * load(row);
        grad += L;
        row += L;
      }
      if (by_feature) {
        keys.whole[i] += lane_sum<C>(products);
      } else {
        total += products;
      }
    };
    add_products(s.K, 2 * chunk.n, Vp, chunk.early, Kp, given, grad_memory, decayed);
    if (!by_feature) keys.whole[0] = lane_sum<C>(total);
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Backward, Shape> backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::delta_memory
