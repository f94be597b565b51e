// Rows of logits, float32 on the CPU: softmax statistics and probabilities, and the gradient from (logprob, entropy).
//
// Each row is copied into memory of whole vectors, -inf where an id does not count, so that no loop knows of banned ids, padding
// or a last, incomplete vector. What a row yields depends on the row and the processor's instruction set, bit for bit, not on how
// many rows there are or on the number of threads. Sums are float32 over 512 ids and float64 over these.
#pragma once

#include <cstdint>

namespace thyme {

struct LogitRows {
    const float* z;  // [rows, vocab_size], `step` elements from a row to the next
    int64_t step, rows, vocab_size;
    const int64_t* banned;  // [num_banned] ids below vocab_size: probability 0
    int64_t num_banned;
    const float* tau;        // [rows] temperatures, below 1e-30 as 1e-30 but for 0; null: all 1
    const uint8_t* counted;  // [rows]; a row of 0 is never read; null: all rows count
};

// stats [4, rows]: the largest logit, log sum e^(x / tau), log sum e^x with x = z - largest, and the entropy at temperature 1;
// 0 in rows that do not count. p, unless null, receives softmax(z / tau) in rows of `p_step` elements. At tau 0 that is the point
// mass on the largest, the first of several, and the statistics are those of temperature 1.
void softmax_rows(const LogitRows& rows, float* stats, float* p, int64_t p_step, int threads);

// tokens [rows]: an id of each row, drawn from softmax(z / tau) by u [rows] in [0, 1): the first whose cdf, sums of float64, passes u
// of the whole. drawn [3, rows]: its log-prob, 0 at tau 0, that at temperature 1, and the entropy there.
void draw_rows(const LogitRows& rows, const double* u, int64_t* tokens, float* drawn, int threads);

// dz [rows, columns] = g / tau (1[target] - p_tau) - h p_1 (log p_1 + entropy), 0 from vocab_size on; dz may be z. A row whose g
// and h are 0 is written, never read. `stats` is what softmax_rows gave; h may be null; tau may not be 0.
void softmax_rows_gradient(const LogitRows& rows, const int64_t* targets, const float* stats, const float* g, const float* h,
                           float* dz, int64_t dz_step, int64_t columns, int threads);

}  // namespace thyme
