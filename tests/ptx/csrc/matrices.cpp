// Tensor cores: a warp multiplies small matrices, whose elements its lanes hold.
//
// Lane l holds, of 8 by 8 pieces, row l / 4 and neighbouring columns from l % 4 on.
#include "matrices.h"

#include <cstring>

#include "memory.h"

namespace ptx {
namespace {

// ldmatrix, stmatrix: lane l gives the address of row l % 8 of piece l / 8; a row is 16 bytes.
template <int Pieces, bool Transposed, bool Store>
void move_matrix(Warp& w, const Instruction& i, Mask) {
  const int address = Store ? 0 : Pieces, first = Store ? 1 : 0;
  uint16_t rows[8 * Pieces][8];
  const auto at = [&](int row) { return w.any_width(i, address, row) + i.immediate; };
  const auto element = [&](int lane, int piece, int half) -> uint16_t& {
    const int row = lane / 4, column = lane % 4 * 2 + half;
    return Transposed ? rows[piece * 8 + column][row] : rows[piece * 8 + row][column];
  };
  if constexpr (!Store)
    for (int row = 0; row < 8 * Pieces; ++row)
      if (!load_bytes(w, i, row, Space::Shared, at(row), 16, reinterpret_cast<uint8_t*>(rows[row])))
        std::memset(rows[row], 0xff, 16);
  for (int piece = 0; piece < Pieces; ++piece) {
    auto* lanes = w.lanes<uint32_t>(i, first + piece);
    for (int lane = 0; lane < kLanes; ++lane) {
      if constexpr (Store) {
        element(lane, piece, 0) = static_cast<uint16_t>(lanes[lane]);
        element(lane, piece, 1) = static_cast<uint16_t>(lanes[lane] >> 16);
      } else {
        lanes[lane] = element(lane, piece, 0) | uint32_t(element(lane, piece, 1)) << 16;
      }
    }
  }
  if constexpr (Store)
    for (int row = 0; row < 8 * Pieces; ++row)
      store_bytes(w, i, row, Space::Shared, at(row), 16, reinterpret_cast<uint8_t*>(rows[row]));
}

// d [16, 8] = a [16, K] b [K, 8] + c; operands are the registers of d, a, b and c in this order.
template <class T, int K>
void multiply(Warp& w, const Instruction& i, Mask) {
  constexpr int per = elements_in_register<T>, block = 4 * per, a_registers = 2 * K / block;
  float a[16][K], b[K][8], d[16][8];
  left_factor<T, K>(w, i, 4, a);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4;
    for (int r = 0; r < a_registers / 2; ++r)
      for (int k = 0; k < per; ++k)
        b[r * block + column * per + k][row] =
            element<T>(w.lanes<uint32_t>(i, 4 + a_registers + r)[lane], k);
    for (int r = 0; r < 4; ++r)
      d[row + r / 2 * 8][column * 2 + r % 2] = w.lanes<float>(i, 4 + a_registers * 3 / 2 + r)[lane];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int r = 0; r < 4; ++r) {
    auto* lanes = w.lanes<float>(i, r);
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  }
}

// d [8, 8] = a [8, 4] b [4, 8] + c in double.
void multiply_double(Warp& w, const Instruction& i, Mask) {
  double a[8][4], b[4][8], d[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4;
    a[row][column] = w.lanes<double>(i, 2)[lane];
    b[column][row] = w.lanes<double>(i, 3)[lane];
    for (int r = 0; r < 2; ++r) d[row][column * 2 + r] = w.lanes<double>(i, 4 + r)[lane];
  }
  for (int row = 0; row < 8; ++row)
    for (int k = 0; k < 4; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int r = 0; r < 2; ++r)
    for (int lane = 0; lane < kLanes; ++lane)
      w.lanes<double>(i, r)[lane] = d[lane / 4][lane % 4 * 2 + r];
}

template <int Pieces>
void add_moves(Operations& table, const std::string& pieces) {
  table["ldmatrix" + pieces] = move_matrix<Pieces, false, false>;
  table["ldmatrix" + pieces + ".trans"] = move_matrix<Pieces, true, false>;
  table["stmatrix" + pieces] = move_matrix<Pieces, false, true>;
  table["stmatrix" + pieces + ".trans"] = move_matrix<Pieces, true, true>;
}

}  // namespace

void add_matrix_operations(Operations& table) {
  add_moves<1>(table, ".x1");
  add_moves<2>(table, ".x2");
  add_moves<4>(table, ".x4");
  table["mma.m16n8k16.f16"] = multiply<Half, 16>;
  table["mma.m16n8k8.f16"] = multiply<Half, 8>;
  table["mma.m16n8k16.bf16"] = multiply<BFloat16, 16>;
  table["mma.m16n8k8.bf16"] = multiply<BFloat16, 8>;
  table["mma.m16n8k8.tf32"] = multiply<TF32, 8>;
  table["mma.m16n8k4.tf32"] = multiply<TF32, 4>;
  table["mma.m8n8k4.f64"] = multiply_double;
}

}  // namespace ptx
