// Register-blocked products of small row-major matrices that live in cache: C (+)= A B.
//
// The inner kernel holds up to kGroupRows rows times two vectors of C in registers and takes, a step, one
// row of B and one operand of A for each row. Every element of C is one chain of multiply-adds in rising
// order of the inner index, so a result does not depend on where in a block it is computed.
#pragma once

#include "operands.h"

namespace reformer {
namespace REFORMER_ISA {

// Rows of C in one block. With two vectors a row the accumulators fill most of 16 registers; of 32 they leave
// half free, as fewer rows at a time skip more of what a causal mask excludes.
constexpr int kGroupRows = kLanes == 16 ? 8 : 6;

// Rows of B that are neighbours in memory; B is one piece after the other. Depths and strides are in
// operands.
template <typename Op>
struct Piece {
  const Op* rows;
  int64_t depth;
};
template <typename Op>
struct Pieces {
  const Piece<Op>* pieces;
  int64_t count, row_stride;
};

// A's element (row, k): a[row * a_stride + k], or a[k * a_stride + row] where kTransposed.
template <typename Op, bool kTransposed, int kRows, int kVectors>
static __attribute__((noinline)) void multiply_block(const Op* a, int64_t a_stride, const Pieces<Op>& b,
                                                     int64_t b_column, float* c, int64_t c_stride,
                                                     bool accumulate) {
  vfloat sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      sum[row][v] = accumulate ? load(c + row * c_stride + v * kLanes) : vfloat{};
  for (int64_t piece = 0; piece < b.count; ++piece) {
    const Op* b_row = b.pieces[piece].rows + b_column;
    for (int64_t k = 0; k < b.pieces[piece].depth; ++k) {
      OperandVector<Op> b_vector[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) b_vector[v] = load_as<OperandVector<Op>>(b_row + v * kLanes);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        const Op a_element = load_as<Op>(a + (kTransposed ? row : row * a_stride));
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[row][v] = multiply_add(sum[row][v], a_element, b_vector[v]);
      }
      a += kTransposed ? a_stride : 1;
      b_row += b.row_stride;
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + row * c_stride + v * kLanes, sum[row][v]);
}

template <typename Op>
using BlockKernel = void (*)(const Op*, int64_t, const Pieces<Op>&, int64_t, float*, int64_t, bool);

template <typename Op, bool kTransposed, int kVectors, int kRows = kGroupRows>
REFORMER_INLINE BlockKernel<Op> block_kernel(int rows) {
  if constexpr (kRows == 1) {
    (void)rows;
    return multiply_block<Op, kTransposed, 1, kVectors>;
  } else {
    return rows == kRows ? multiply_block<Op, kTransposed, kRows, kVectors>
                         : block_kernel<Op, kTransposed, kVectors, kRows - 1>(rows);
  }
}

// C[0 .. rows)[0 .. width) (+)= A B for rows <= kGroupRows and a width that is a multiple of kLanes.
template <bool kTransposed, typename Op>
REFORMER_INLINE void multiply_group(int rows, const Op* a, int64_t a_stride, const Pieces<Op>& b,
                                    int64_t width, float* c, int64_t c_stride, bool accumulate) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes)
    block_kernel<Op, kTransposed, 2>(rows)(a, a_stride, b, column, c + column, c_stride, accumulate);
  if (column < width)
    block_kernel<Op, kTransposed, 1>(rows)(a, a_stride, b, column, c + column, c_stride, accumulate);
}

// The same for any number of rows.
template <bool kTransposed, typename Op>
REFORMER_INLINE void multiply(int64_t rows, const Op* a, int64_t a_stride, const Pieces<Op>& b, int64_t width,
                              float* c, int64_t c_stride, bool accumulate) {
  for (int64_t row = 0; row < rows; row += kGroupRows)
    multiply_group<kTransposed>(static_cast<int>(min_of<int64_t>(kGroupRows, rows - row)),
                                a + row * (kTransposed ? 1 : a_stride), a_stride, b, width,
                                c + row * c_stride, c_stride, accumulate);
}

}  // namespace REFORMER_ISA
}  // namespace reformer
