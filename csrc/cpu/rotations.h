// Random rotations by counter: a number depends on the seed and on its place (head, dimension, round, column)
// alone, so any part of the rotations can be drawn anywhere. reformer_kernels/_random.py has the definition.
#pragma once

#include "simd/philox.h"

namespace reformer {
namespace REFORMER_ISA {

// A number of mean 0, variance 1 and nearly normal distribution from each word: the number of its one bits,
// which is binomial, plus a fraction in (-1, 1) of triangular distribution that fills the gaps between whole
// numbers. The sum is exact in integers, and the one product rounds alike everywhere.
REFORMER_INLINE vfloat normal_numbers(vuint word) {
  vuint ones = word - ((word >> 1) & 0x55555555u);
  ones = (ones & 0x33333333u) + ((ones >> 2) & 0x33333333u);
  ones = ((((ones + (ones >> 4)) & 0x0F0F0F0Fu) * 0x01010101u) >> 24) << 16;
  const vuint mixed = word * 0x9E3779B9u;
  const vint sum = (vint)(ones + (mixed >> 16) + (mixed & 0xFFFFu)) - (16 * 65536 + 65535);
  return __builtin_convertvector(sum, vfloat) * 0x1.665356p-18f;
}

// out (dims, rounds, width) = the columns [0, width) of the dimensions from first_dim on and the rounds from
// first_round on, of one head.
REFORMER_INLINE void draw_rotations(uint64_t seed, int64_t head, int64_t first_dim, int64_t dims,
                                    int64_t first_round, int64_t rounds, int64_t width, float* out) {
  // Each counter serves four columns: counters (dims, rounds, groups) are taken in this order, kLanes at a
  // time, and their coordinates are counted up by as much, with carries.
  const int64_t groups = (width + 3) / 4, total = dims * rounds * groups;
  vint dim, round, group;
  const vuint order = block_order();
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = order[lane];
    group[lane] = static_cast<int32_t>(i % groups);
    round[lane] = static_cast<int32_t>(i / groups % rounds);
    dim[lane] = static_cast<int32_t>(i / groups / rounds);
  }
  const auto group_step = static_cast<int32_t>(kLanes % groups);
  const auto round_step = static_cast<int32_t>(kLanes / groups % rounds);
  const auto dim_step = static_cast<int32_t>(kLanes / groups / rounds);
  const auto group_count = static_cast<int32_t>(groups), round_count = static_cast<int32_t>(rounds);
  const uint32_t dim_origin = 0x80000000u + static_cast<uint32_t>(first_dim);
  for (int64_t first = 0; first < total; first += kLanes) {
    Counters c = {static_cast<uint32_t>(head) - vuint{}, (vuint)dim + dim_origin,
                  (vuint)round + static_cast<uint32_t>(first_round), (vuint)group};
    philox(seed, c);
    const vfloat z0 = normal_numbers(c.x0), z1 = normal_numbers(c.x1);
    const vfloat z2 = normal_numbers(c.x2), z3 = normal_numbers(c.x3);
    if (width % 4 == 0 && first + kLanes <= total) {
      store_blocks(z0, z1, z2, z3, out + 4 * first);
    } else {
      float numbers[4 * kLanes];
      store_blocks(z0, z1, z2, z3, numbers);
      for (int64_t i = 0; i < min_of<int64_t>(kLanes, total - first); ++i) {
        const int64_t row = (first + i) / groups, column = (first + i) % groups * 4;
        for (int64_t j = 0; j < min_of<int64_t>(4, width - column); ++j)
          out[row * width + column + j] = numbers[4 * i + j];
      }
    }
    group += group_step;
    const vint group_carry = group >= group_count;
    group -= group_carry & group_count;
    round += round_step - group_carry;
    const vint round_carry = round >= round_count;
    round -= round_carry & round_count;
    dim += dim_step - round_carry;
  }
}

}  // namespace REFORMER_ISA
}  // namespace reformer
