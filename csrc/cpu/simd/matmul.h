// Register-blocked products of small row-major matrices that are in the cache: C = A B or C += A B.
//
// The inner kernel holds up to kGroupRows rows times two vectors of C in registers. Each step takes one row
// of B, and one operand of A for each row of C. Every element of C is one chain of multiply-adds in rising
// order of the inner index, so its value does not depend on where in a block it is computed.
#pragma once

#include "operands.h"

namespace reformer {
namespace REFORMER_ISA {

// The rows of C in one block. With two vectors per row the accumulators fill most of 16 registers. With
// AVX-512 they fill only half of 32: the fewer rows at a time, the more of a causal mask can be skipped.
constexpr int kGroupRows = kLanes == 16 ? 8 : 6;

// B is given as pieces, one below the other, because its rows are gathered panel by panel. A piece is `depth`
// rows that are neighbours in memory. Depths and strides are counted in operands.
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

// One block. Element (row, k) of A is a[row * a_stride + k], or a[k * a_stride + row] if kTransposed.
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

// The kernel for `rows` rows, from 1 to kGroupRows.
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

// C[0 .. rows)[0 .. width) = A B, or += if `accumulate`, for at most kGroupRows rows and a width that is a
// multiple of kLanes.
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
