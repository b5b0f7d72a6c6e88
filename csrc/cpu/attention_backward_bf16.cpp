// Attention backward in bf16 on tiles or dot products, softmax alone. With P the weights and dW
// their gradient,
//   dP = dO V^T + dW,  dS = P (dP - rowsum(dP P)), zero where masked,
//   dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
// Threads take tasks, parts of a batch's queries, and go through each in blocks of at most 32
// queries, one block of k in the sums over queries; their rows of P and dS stay in L2:
//   once a batch  values and keys packed into panels of 64 columns: keys by blocks of 32 features
//                 of a value; features of a key by blocks of 32 keys
//   pass 1  the block's dO and Q as rows and as pairs of rows
//   pass 2  dvalue[Tk, Dv] += P^T dO                   P transposed, 32 keys at a time
//   pass 3  slopes[rows, Tk] = dO value^T, float32     a panel in L1 for all the rows
//   pass 4  slopes -> dS, bf16; stored where the mask's gradient is wanted
//   pass 5  grad_query[rows, D] = scale dS key
//   pass 6  dkey[Tk, D] += dS^T Q                      dS transposed, 32 keys at a time
// Where a batch has several tasks each has its own dkey and dvalue, which are added at the end.
// dS enters its products rounded, as it does where these are separate ops.
#include "attention_bf16.h"

namespace seqmem::attention {
namespace {

constexpr int64_t kBlockRows = kDepth;

template <class S>
class BackwardRun : KernelRun<Backward, ThreadOf<Shape, Plan>> {
  using C = float;
  static constexpr int L = kLanes<C>;

  // Query rows of a block; stride of its float32 rows of keys
  const int64_t block = min(kBlockRows, s.Tq);
  const int64_t stride = score_stride<C>(ceil_div(s.Tk, kPanel) * kPanel);
  // Whole blocks of keys, whole panels of features
  const int64_t Tk_pad = ceil_div(s.Tk, kDepth) * kDepth, D_pad = ceil_div(s.D, kPanel) * kPanel;
  const int64_t Dv_pad = ceil_div(s.Dv, kPanel) * kPanel;
  // Dv and Tk in whole blocks of k, the latter and some more
  const int64_t grad_stride = ceil_div(s.Dv, kDepth) * kDepth, row_stride = Tk_pad + kDepth;
  // Whether dO is there, whether any of dQ, dK, dmask is
  const bool has_output = a.grad_output.data != nullptr;
  const bool scores_wanted =
      a.grad_query != nullptr || a.grad_key != nullptr || a.grad_mask != nullptr;

  KeySums<S> of_keys{s, plan, a.grad_key, s.D, D_pad, Tk_pad};
  KeySums<S> of_values{s, plan, a.grad_value, s.Dv, Dv_pad, Tk_pad};
  // This thread's own.
  Panels value_panels{nullptr, grad_stride / kDepth, is_wide(block)};  // of a batch
  Panels key_panels{nullptr, Tk_pad / kDepth, is_wide(block)};
  Panels grad_pairs{nullptr, 1, is_wide(kDepth)}, query_pairs = grad_pairs;  // of a block
  S* grads;                          // of a block: [block, grad_stride]
  S *weights, *slopes, *transposed;  // [block, row_stride] twice, [Tk_pad, 32]
  C *scores, *out;                   // [block, stride], [block, D_pad]
  C* mask_copy;                      // [block, stride]

 public:
  using KernelRun<Backward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    of_keys.place(take);
    of_values.place(take);
    take.per_thread(thread, threads, [&] {
      value_panels.data = take.array<S>(ceil_div(s.Tk, kPanel) * kPanel * grad_stride);
      key_panels.data = take.array<S>(D_pad * Tk_pad);
      grad_pairs.data = take.array<S>(Dv_pad * kDepth);
      query_pairs.data = take.array<S>(D_pad * kDepth);
      grads = take.array<S>(block * grad_stride);
      weights = take.array<S>(block * row_stride);
      slopes = take.array<S>(block * row_stride);
      transposed = take.array<S>(Tk_pad * kDepth);
      scores = take.array<C>(block * stride);
      out = take.array<C>(block * D_pad);
      mask_copy = take.array<C>(copies_mask<S>(s, a.mask) ? block * stride : 0);
      of_keys.place_own(take);
      of_values.place_own(take);
    });
    return take.used();
  }

  void run() {
    int64_t packed = -1;  // the batch whose keys and values the panels hold
    Task task;
    while (take_task(s, plan, block, task)) {
      if (task.n != packed && scores_wanted) {
        packed = task.n;
        if (has_output) pack_as_columns(value_panels, Rows<S>(a.value, packed), s.Tk, s.Dv);
        if (a.grad_query != nullptr)
          pack_as_rows(key_panels, Rows<S>(a.key, packed), s.Tk, s.D, D_pad / kPanel);
      }
      for (KeySums<S>* each : {&of_keys, &of_values}) {
        each->enter(task);
        each->clear();
      }
      for (int64_t i = task.begin; i < task.end; i += block)
        run_block(task.n, i, min(block, task.end - i));
      of_keys.store_task(task.n, C(s.scale));
      of_values.store_task(task.n);
    }
    tiles_release();
    if (plan.groups == 1) return;
    barrier.wait();
    of_keys.store_all(thread, threads, C(s.scale));
    of_values.store_all(thread, threads);
  }

 private:
  void run_block(int64_t n, int64_t i, int64_t rows) {
    const int64_t keys = visible_keys(s, i + rows), whole = ceil_div(keys, kDepth) * kDepth;
    const Rows<S> query(a.query, n), grad_output(a.grad_output, n);
    const Rows<S> given(static_cast<const S*>(a.weights) + (n * s.Tq + i) * s.Tk, s.Tk, 1);
    MaskRows<C> mask;
    if (s.mask == MaskKind::Allowed && scores_wanted)
      mask_rows<S>(mask, a.mask, s.mask, n, i, rows, keys, mask_copy, stride);
    copy_left(weights, row_stride, given, 0, rows, keys, whole);
    if (has_output) {
      copy_left(grads, grad_stride, grad_output, i, rows, s.Dv, grad_stride);
      if (a.grad_value != nullptr) {
        pack_as_rows(grad_pairs, part_of(grad_output, i), rows, s.Dv, Dv_pad / kPanel);
        add_products(weights, rows, whole, grad_pairs, of_values.sums, Dv_pad);
      }
    }
    if (!scores_wanted) return;
    const RowGroup group = row_group(0, rows, value_panels.wide);
    configure(rows);
    if (has_output)
      for (int64_t p = 0; p < ceil_div(keys, kPanel); ++p)
        sum_products(group, {{value_panels, p, grads, grad_stride, value_panels.depth}}, nullptr, 0,
                     scores + p * kPanel, stride, kNothing);
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(n, i, r, keys, whole, s.mask == MaskKind::Allowed ? mask.allowed[r] : nullptr);
      if (a.grad_mask == nullptr) continue;
      S* to = static_cast<S*>(a.grad_mask) + (n * s.Tq + i + r) * s.Tk;
      __builtin_memcpy(to, slopes + r * row_stride, keys * sizeof(S));
      __builtin_memset(static_cast<void*>(to + keys), 0, (s.Tk - keys) * sizeof(S));
    }
    if (a.grad_query != nullptr) {
      configure(rows);
      for (int64_t p = 0; p < D_pad / kPanel; ++p)
        sum_products(group, {{key_panels, p, slopes, row_stride, whole / kDepth}}, nullptr, 0,
                     out + p * kPanel, D_pad, kNothing);
      for (int64_t r = 0; r < rows; ++r) {
        C* row = out + r * D_pad;
        store_scaled(static_cast<S*>(a.grad_query) + (n * s.Tq + i + r) * s.D, row, s.D,
                     C(s.scale));
      }
    }
    if (a.grad_key != nullptr) {
      pack_as_rows(query_pairs, part_of(query, i), rows, s.D, D_pad / kPanel);
      add_products(slopes, rows, whole, query_pairs, of_keys.sums, D_pad);
    }
  }

  static Rows<S> part_of(const Rows<S>& m, int64_t row) { return {m.row(row), m.rows, m.columns}; }

  // to[keys, width_pad] += left^T right, left [rows, whole blocks of keys].
  void add_products(const S* left, int64_t rows, int64_t keys, const Panels& right, C* to,
                    int64_t width_pad) {
    const auto row = [&](int64_t r) { return r < rows ? left + r * row_stride : nullptr; };
    for (int64_t j = 0; j < keys; j += kBlock) {
      alignas(64) float square[kBlock][kBlock];
      for (int r = 0; r < kBlock; ++r) {
        const S *even = row(2 * r), *odd = row(2 * r + 1);
        store_pairs(square[r], even == nullptr ? nullptr : even + j,
                    odd == nullptr ? nullptr : odd + j, kBlock);
      }
      transpose_tile(square, reinterpret_cast<float*>(transposed + j * kDepth), kBlock);
    }
    configure(kBlock);
    for (int64_t p = 0; p < width_pad / kPanel; ++p)
      for (int64_t j = 0; j < keys; j += kDepth) {
        C* sums = to + j * width_pad + p * kPanel;
        sum_products(row_group(j, j + kDepth, right.wide), {{right, p, transposed, kDepth, 1}},
                     sums, width_pad, sums, width_pad, kNothing);
      }
  }

  // scores -> slopes = dS in bf16, from dO V^T where there is a dO; zero up to a whole block.
  void finish_row(int64_t n, int64_t i, int64_t r, int64_t keys, int64_t whole,
                  const uint8_t* allowed) {
    C* score = scores + r * stride;
    const S* weight = weights + r * row_stride;
    S* slope = slopes + r * row_stride;
    const Rows<S> grad_weights(a.grad_weights, n);
    const S* grad = grad_weights.data == nullptr ? nullptr : grad_weights.row(i + r);
    Vec<C> total{};
    for (int64_t j = 0; j < whole; j += L) {
      const int lanes = static_cast<int>(min<int64_t>(L, max<int64_t>(0, keys - j)));
      Vec<C> x = has_output ? load(score + j) : Vec<C>{};
      if (grad != nullptr)
        x += load_strided(grad + j * grad_weights.columns, grad_weights.columns, lanes);
      x = first_lanes(x, lanes);  // beyond the keys a panel's columns are not this row's
      store(score + j, x);
      total += x * load(weight + j);
    }
    const C mean = lane_sum<C>(total);
    for (int64_t j = 0; j < whole; j += L) {
      const int lanes = static_cast<int>(min<int64_t>(L, max<int64_t>(0, keys - j)));
      Vec<C> x = load(weight + j) * (load(score + j) - mean);
      if (allowed != nullptr && lanes > 0)
        x = allowed_lanes<C>(allowed + j, lanes, j > 0) ? x : Vec<C>{};
      store(slope + j, first_lanes(x, lanes));
    }
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::BFloat16, Backward, Shape, Plan>::table;

}  // namespace seqmem::attention
