// FlashAttention-2 (Dao 2023, arXiv 2307.08691) on a CPU, forward and backward. The algorithm in torch: flash_attention.py.
//
// A thread takes a head of keys of one sequence, and all queries that read it.
//
//                 keys, COLUMNS at a time →
//     queries,    ■ ■ ■ ◣                    every product of a tile goes through one small kernel: rows × columns of sums
//     ROWS at     ■ ■ ■ ■ ◣                  in registers, one number of A for all columns, one row of B for all rows
//     a time ↓    ■ ■ ■ ■ ■ ◣
//
//                      b b b b   B: k × columns, a vector of them at a time         Everything that is multiplied is stored as words of
//                  a ◄ · · · ·                                                       32 bits along k: an fp32 number, or two bf16 numbers
//     A: rows × k  a ◄ · · · ·   the sums: ACROSS × DOWN vectors                     that stand next to each other along k, which one
//                  a ◄ · · · ·                                                       instruction multiplies and adds (AVX512-BF16).
//
// So the same code does both; which one is compiled, -DBF16 says. What differs is how words come to be: along a row they lie in memory
// already; down a column two rows of bf16 are dovetailed ("paired"), where fp32 needs nothing.

#include "vectors.h"

namespace {

constexpr int DOWN = 6, ACROSS = WIDTH == 16 ? 4 : 2;  // 24 of 32 registers hold sums, or 12 of 16
constexpr int ROWS = 48, COLUMNS = 48;                 // multiples of DOWN: two tiles of them, 18 kB, stay in the first cache

// --- products -------------------------------------------------------------------------------------------------------------

// C (rows × columns, fp32) = or += A B over `depth` words. A's number for row r and word k: a[r · a_row + k · a_word].
template <class Kind, int R, int C>
inline __attribute__((always_inline)) void multiply_few(
    const uint32_t* a, ptrdiff_t a_row, ptrdiff_t a_word, const uint32_t* b, ptrdiff_t b_word, ptrdiff_t depth,
    float* c, ptrdiff_t c_row, bool add) {
    floats sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) sums[r][v] = add ? load<floats>(c + r * c_row + v * WIDTH) : floats{};
    for (ptrdiff_t k = 0; k < depth; ++k) {
        words row[C];
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) row[v] = load<words>(b + k * b_word + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            float number;
            std::memcpy(&number, a + r * a_row + k * a_word, 4);
            const words one = as_words(all(number));
#pragma GCC unroll 4
            for (int v = 0; v < C; ++v) sums[r][v] = Kind::plus_product(sums[r][v], one, row[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) store(c + r * c_row + v * WIDTH, sums[r][v]);
}

template <class Kind, int C>
void multiply_strip(
    const uint32_t* a, ptrdiff_t a_row, ptrdiff_t a_word, ptrdiff_t rows, const uint32_t* b, ptrdiff_t b_word,
    ptrdiff_t depth, float* c, ptrdiff_t c_row, bool add) {
    ptrdiff_t r = 0;
    for (; r + DOWN <= rows; r += DOWN)
        multiply_few<Kind, DOWN, C>(a + r * a_row, a_row, a_word, b, b_word, depth, c + r * c_row, c_row, add);
    for (; r + 2 <= rows; r += 2)
        multiply_few<Kind, 2, C>(a + r * a_row, a_row, a_word, b, b_word, depth, c + r * c_row, c_row, add);
    if (r < rows)
        multiply_few<Kind, 1, C>(a + r * a_row, a_row, a_word, b, b_word, depth, c + r * c_row, c_row, add);
}

// `columns` is a multiple of WIDTH.
template <class Kind>
void multiply(
    const uint32_t* a, ptrdiff_t a_row, ptrdiff_t a_word, ptrdiff_t rows, const uint32_t* b, ptrdiff_t b_word,
    ptrdiff_t columns, ptrdiff_t depth, float* c, ptrdiff_t c_row, bool add) {
    static_assert(ACROSS == 2 || ACROSS == 4, "the switch names every smaller number");
    ptrdiff_t j = 0;
    for (; j + ACROSS * WIDTH <= columns; j += ACROSS * WIDTH)
        multiply_strip<Kind, ACROSS>(a, a_row, a_word, rows, b + j, b_word, depth, c + j, c_row, add);
    switch ((columns - j) / WIDTH) {
        case 3: multiply_strip<Kind, 3>(a, a_row, a_word, rows, b + j, b_word, depth, c + j, c_row, add); break;
        case 2: multiply_strip<Kind, 2>(a, a_row, a_word, rows, b + j, b_word, depth, c + j, c_row, add); break;
        case 1: multiply_strip<Kind, 1>(a, a_row, a_word, rows, b + j, b_word, depth, c + j, c_row, add); break;
        default: break;
    }
}

// --- words ----------------------------------------------------------------------------------------------------------------

template <class Kind> inline const uint32_t* in_words(const typename Kind::number* row) {
    return reinterpret_cast<const uint32_t*>(row);
}

// A tensor (batch, heads, length, width) with any strides but the last, in numbers.
template <class Kind> struct Tensor {
    typename Kind::number* data;
    ptrdiff_t batch, head, token;
    Tensor(void* at, const int64_t* strides)
        : data((typename Kind::number*)at), batch(strides[0]), head(strides[1]), token(strides[2]) {}
    typename Kind::number* of(ptrdiff_t b, ptrdiff_t h) const { return data + b * batch + h * head; }
};

// (width words × length), turned: words of the rows become columns. The end of the last vector is 0.
template <class Kind>
void turned(const typename Kind::number* x, ptrdiff_t token, ptrdiff_t length, ptrdiff_t width, uint32_t* to, ptrdiff_t to_row) {
    const ptrdiff_t deep = width / Kind::PER_WORD;
    constexpr ptrdiff_t BLOCK = 16;  // a block's lines stay in the cache
    for (ptrdiff_t t0 = 0; t0 < length; t0 += BLOCK)
        for (ptrdiff_t k0 = 0; k0 < deep; k0 += BLOCK)
            for (ptrdiff_t k = k0; k < std::min(k0 + BLOCK, deep); ++k)
                for (ptrdiff_t t = t0; t < std::min(t0 + BLOCK, length); ++t)
                    std::memcpy(to + k * to_row + t, in_words<Kind>(x + t * token) + k, 4);
    for (ptrdiff_t k = 0; k < deep; ++k)
        for (ptrdiff_t t = length; t < to_row; ++t) to[k * to_row + t] = 0;
}

// (length words × width), rows in pairs for bf16: word (j, d) holds x[2j][d] and x[2j + 1][d]. What is beyond either end is 0.
template <class Kind>
void paired(const typename Kind::number* x, ptrdiff_t token, ptrdiff_t length, ptrdiff_t width, uint32_t* to, ptrdiff_t to_row) {
    if constexpr (Kind::PER_WORD == 1) {
        for (ptrdiff_t t = 0; t < length; ++t) {
            std::memcpy(to + t * to_row, x + t * token, width * 4);
            std::memset(to + t * to_row + width, 0, (to_row - width) * 4);
        }
        return;
    }
    for (ptrdiff_t t = 0; t < length; t += 2) {
        const auto* first = x + t * token;
        const auto* second = x + (t + 1) * token;
        uint32_t* row = to + t / 2 * to_row;
        const bool both = t + 1 < length;
        ptrdiff_t d = 0;
        for (; both && d + WIDTH <= width; d += WIDTH)
            store(row + d, as_words(Kind::widened(first + d)) >> 16 | as_words(Kind::widened(second + d)));
        for (; d < width; ++d) row[d] = (uint32_t)first[d] | (both ? (uint32_t)second[d] << 16 : 0u);
        for (; d < to_row; ++d) row[d] = 0;
    }
}

// --- the algorithm --------------------------------------------------------------------------------------------------------

struct Sizes {
    int64_t batch, heads, kv_heads, queries, keys, width, value_width, window;  // window 0: none
    float scale;
    // Keys that a query may read: [first, last).
    int64_t last(int64_t query) const { return std::max<int64_t>(0, std::min(keys, query + keys - queries + 1)); }
    int64_t first(int64_t query) const {
        return window ? std::max<int64_t>(0, query + keys - queries - window + 1) : 0;
    }
};

// Exponentials of one row's scores in place, 2^(score · scale − shift), 0 outside [from, to); returns their sum.
inline float exponentials(float* scores, ptrdiff_t columns, ptrdiff_t from, ptrdiff_t to, float scale, float shift) {
    for (ptrdiff_t j = 0; j < std::min(from, columns); ++j) scores[j] = NONE;
    for (ptrdiff_t j = std::max<ptrdiff_t>(to, 0); j < columns; ++j) scores[j] = NONE;
    const floats by = all(scale), less = all(shift);
    floats total{};
    for (ptrdiff_t j = 0; j < columns; j += WIDTH) {
        const floats p = exp2_of(load<floats>(scores + j) * by - less);
        store(scores + j, p);
        total += p;
    }
    return sum_of(total);
}

inline float row_maximum(const float* scores, ptrdiff_t from, ptrdiff_t to) {
    float best = NONE;
    ptrdiff_t j = from;
    if (to - from >= WIDTH) {
        floats bests = load<floats>(scores + j);
        for (j += WIDTH; j + WIDTH <= to; j += WIDTH) {
            const floats x = load<floats>(scores + j);
            bests = x > bests ? x : bests;
        }
        best = largest_of(bests);
    }
    for (; j < to; ++j) best = scores[j] > best ? scores[j] : best;
    return best;
}

// A tile's numbers as words along its rows (`to` has columns / PER_WORD words a row).
template <class Kind> inline const uint32_t* along(const float* tile, ptrdiff_t rows, ptrdiff_t columns, uint32_t* to) {
    if (Kind::PER_WORD == 1) return reinterpret_cast<const uint32_t*>(tile);
    for (ptrdiff_t r = 0; r < rows; ++r)
        for (ptrdiff_t j = 0; j < columns; j += WIDTH)
            Kind::rounded(reinterpret_cast<typename Kind::number*>(to + r * (COLUMNS / 2)) + j,
                          load<floats>(tile + r * COLUMNS + j));
    return to;
}

// And as words down its columns, rows in pairs; `rows` is even or the row beyond is 0.
template <class Kind> inline const uint32_t* down(const float* tile, ptrdiff_t rows, ptrdiff_t columns, uint32_t* to);
template <> inline const uint32_t* down<Single>(const float* tile, ptrdiff_t, ptrdiff_t, uint32_t*) {
    return reinterpret_cast<const uint32_t*>(tile);
}
template <> inline const uint32_t* down<Brain>(const float* tile, ptrdiff_t rows, ptrdiff_t columns, uint32_t* to) {
    const words upper = words{} + 0xffff0000u;
    for (ptrdiff_t r = 0; r < rows; r += 2)
        for (ptrdiff_t j = 0; j < columns; j += WIDTH) {
            const words first = Brain::nearest(load<floats>(tile + r * COLUMNS + j));
            words second{};
            if (r + 1 < rows) second = Brain::nearest(load<floats>(tile + (r + 1) * COLUMNS + j)) & upper;
            store(to + r / 2 * COLUMNS + j, (first >> 16) | second);
        }
    return to;
}

template <class Kind> void write_row(const float* from, typename Kind::number* to, ptrdiff_t width, float by) {
    ptrdiff_t d = 0;
    for (; d + WIDTH <= width; d += WIDTH) Kind::rounded(to + d, load<floats>(from + d) * all(by));
    for (; d < width; ++d) to[d] = Kind::rounded(from[d] * by);
}

template <class Kind>
void forward_head(
    const Sizes& s, int64_t b, int64_t kv, const Tensor<Kind>& q, const Tensor<Kind>& k, const Tensor<Kind>& v,
    const Tensor<Kind>& out, float* log_sums, Workspace& space) {
    constexpr int N = Kind::PER_WORD;
    const ptrdiff_t wide = up(s.value_width, WIDTH), long_ = up(s.keys, WIDTH);
    uint32_t* k_turned = space.take<uint32_t>(s.width / N * long_);
    uint32_t* v_paired = space.take<uint32_t>(up(long_, N) / N * wide);
    float* tile = space.take<float>(ROWS * COLUMNS);
    uint32_t* weights = space.take<uint32_t>(ROWS * COLUMNS);
    float* mixed = space.take<float>(ROWS * wide);
    float highest[ROWS], total[ROWS];
    turned<Kind>(k.of(b, kv), k.token, s.keys, s.width, k_turned, long_);
    paired<Kind>(v.of(b, kv), v.token, s.keys, s.value_width, v_paired, wide);
    for (ptrdiff_t j = up(s.keys, N) / N; j < long_ / N; ++j) std::memset(v_paired + j * wide, 0, wide * 4);
    const float scale = s.scale * LOG2E;
    const int64_t group = s.heads / s.kv_heads;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t i0 = 0; i0 < s.queries; i0 += ROWS) {
            const ptrdiff_t rows = std::min<int64_t>(ROWS, s.queries - i0);
            const int64_t end = s.last(i0 + rows - 1);
            std::fill_n(highest, rows, NONE);
            std::fill_n(total, rows, 0.0f);
            std::memset(mixed, 0, rows * wide * sizeof(float));
            for (int64_t j0 = s.first(i0) / WIDTH * WIDTH; j0 < end; j0 += COLUMNS) {
                const ptrdiff_t columns = std::min<int64_t>(COLUMNS, up(end - j0, WIDTH));
                multiply<Kind>(
                    in_words<Kind>(q.of(b, h) + i0 * q.token), q.token / N, 1, rows, k_turned + j0, long_, columns,
                    s.width / N, tile, COLUMNS, false);
                for (ptrdiff_t r = 0; r < rows; ++r) {
                    float* scores = tile + r * COLUMNS;
                    const ptrdiff_t from = std::max<int64_t>(0, s.first(i0 + r) - j0);
                    const ptrdiff_t to = std::min<int64_t>(columns, s.last(i0 + r) - j0);
                    const float best = std::max(highest[r], from < to ? row_maximum(scores, from, to) * scale : NONE);
                    if (best == NONE) {  // nothing to read so far
                        bool none = true;  // but for NaN, which no comparison finds
                        for (ptrdiff_t j = from; j < to; ++j) none = none && scores[j] == scores[j];
                        if (none) {
                            std::memset(scores, 0, columns * sizeof(float));
                            continue;
                        }
                    }
                    if (best != highest[r] && total[r] != 0.0f) {
                        const float shrunk = std::exp2(highest[r] - best);
                        total[r] *= shrunk;
                        for (ptrdiff_t d = 0; d < wide; d += WIDTH)
                            store(mixed + r * wide + d, load<floats>(mixed + r * wide + d) * all(shrunk));
                    }
                    highest[r] = best;
                    total[r] += exponentials(scores, columns, from, to, scale, best);
                }
                multiply<Kind>(
                    along<Kind>(tile, rows, columns, weights), COLUMNS / N, 1, rows, v_paired + j0 / N * wide, wide,
                    wide, up(columns, N) / N, mixed, wide, true);
            }
            for (ptrdiff_t r = 0; r < rows; ++r) {
                const bool nothing = total[r] == 0.0f;
                write_row<Kind>(
                    mixed + r * wide, out.of(b, h) + (i0 + r) * out.token, s.value_width,
                    nothing ? 0.0f : 1.0f / total[r]);
                log_sums[(b * s.heads + h) * s.queries + i0 + r] =
                    nothing ? -NONE : highest[r] + std::log2(total[r]);
            }
        }
}

template <class Kind>
void backward_head(
    const Sizes& s, int64_t b, int64_t kv, const Tensor<Kind>& d_out, const Tensor<Kind>& q, const Tensor<Kind>& k,
    const Tensor<Kind>& v, const Tensor<Kind>& out, const float* log_sums, const Tensor<Kind>& d_q,
    const Tensor<Kind>& d_k, const Tensor<Kind>& d_v, float* delta, Workspace& space) {
    constexpr int N = Kind::PER_WORD;
    const ptrdiff_t wide = up(s.width, WIDTH), v_wide = up(s.value_width, WIDTH), long_ = up(s.keys, WIDTH);
    uint32_t* k_turned = space.take<uint32_t>(s.width / N * long_);
    uint32_t* v_turned = space.take<uint32_t>(s.value_width / N * long_);
    uint32_t* k_paired = space.take<uint32_t>(up(long_, N) / N * wide);
    float* sum_k = space.take<float>(long_ * wide);
    float* sum_v = space.take<float>(long_ * v_wide);
    uint32_t* q_paired = space.take<uint32_t>(ROWS / N * wide);
    uint32_t* d_out_paired = space.take<uint32_t>(ROWS / N * v_wide);
    float* sum_q = space.take<float>(ROWS * wide);
    float* tile = space.take<float>(ROWS * COLUMNS);
    float* slopes = space.take<float>(ROWS * COLUMNS);
    uint32_t* in_pairs = space.take<uint32_t>(ROWS * COLUMNS);
    turned<Kind>(k.of(b, kv), k.token, s.keys, s.width, k_turned, long_);
    turned<Kind>(v.of(b, kv), v.token, s.keys, s.value_width, v_turned, long_);
    paired<Kind>(k.of(b, kv), k.token, s.keys, s.width, k_paired, wide);
    for (ptrdiff_t j = up(s.keys, N) / N; j < long_ / N; ++j) std::memset(k_paired + j * wide, 0, wide * 4);
    std::memset(sum_k, 0, long_ * wide * sizeof(float));
    std::memset(sum_v, 0, long_ * v_wide * sizeof(float));
    const float scale = s.scale * LOG2E;
    const int64_t group = s.heads / s.kv_heads;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t i0 = 0; i0 < s.queries; i0 += ROWS) {
            const ptrdiff_t rows = std::min<int64_t>(ROWS, s.queries - i0);
            const int64_t end = s.last(i0 + rows - 1);
            const float* sums = log_sums + (b * s.heads + h) * s.queries + i0;
            float* rest = delta + (b * s.heads + h) * s.queries + i0;
            const auto* queries = q.of(b, h) + i0 * q.token;
            const auto* gradients = d_out.of(b, h) + i0 * d_out.token;
            paired<Kind>(queries, q.token, rows, s.width, q_paired, wide);
            paired<Kind>(gradients, d_out.token, rows, s.value_width, d_out_paired, v_wide);
            for (ptrdiff_t r = 0; r < rows; ++r) {  // D = rowsum(dO ∘ O)
                const auto* one = gradients + r * d_out.token;
                const auto* other = out.of(b, h) + (i0 + r) * out.token;
                floats total{};
                ptrdiff_t d = 0;
                for (; d + WIDTH <= s.value_width; d += WIDTH) total = fused(Kind::widened(one + d), Kind::widened(other + d), total);
                float scalar = sum_of(total);
                for (; d < s.value_width; ++d) scalar += Kind::widened(one[d]) * Kind::widened(other[d]);
                rest[r] = scalar;
            }
            std::memset(sum_q, 0, rows * wide * sizeof(float));
            for (int64_t j0 = s.first(i0) / WIDTH * WIDTH; j0 < end; j0 += COLUMNS) {
                const ptrdiff_t columns = std::min<int64_t>(COLUMNS, up(end - j0, WIDTH));
                multiply<Kind>(
                    in_words<Kind>(queries), q.token / N, 1, rows, k_turned + j0, long_, columns, s.width / N, tile,
                    COLUMNS, false);
                multiply<Kind>(
                    in_words<Kind>(gradients), d_out.token / N, 1, rows, v_turned + j0, long_, columns,
                    s.value_width / N, slopes, COLUMNS, false);
                for (ptrdiff_t r = 0; r < rows; ++r) {
                    float *p = tile + r * COLUMNS, *d_p = slopes + r * COLUMNS;
                    const ptrdiff_t from = std::max<int64_t>(0, s.first(i0 + r) - j0);
                    const ptrdiff_t to = std::min<int64_t>(columns, s.last(i0 + r) - j0);
                    exponentials(p, columns, from, to, scale, sums[r]);
                    const floats less = all(rest[r]), by = all(s.scale);
                    for (ptrdiff_t j = 0; j < columns; j += WIDTH)
                        store(d_p + j, load<floats>(p + j) * (load<floats>(d_p + j) - less) * by);
                }
                const ptrdiff_t deep = up(rows, N) / N;
                multiply<Kind>(
                    down<Kind>(tile, rows, columns, in_pairs), 1, COLUMNS, columns, d_out_paired, v_wide, v_wide, deep,
                    sum_v + j0 * v_wide, v_wide, true);
                multiply<Kind>(
                    down<Kind>(slopes, rows, columns, in_pairs), 1, COLUMNS, columns, q_paired, wide, wide, deep,
                    sum_k + j0 * wide, wide, true);
                multiply<Kind>(
                    along<Kind>(slopes, rows, columns, in_pairs), COLUMNS / N, 1, rows, k_paired + j0 / N * wide, wide,
                    wide, up(columns, N) / N, sum_q, wide, true);
            }
            for (ptrdiff_t r = 0; r < rows; ++r)
                write_row<Kind>(sum_q + r * wide, d_q.of(b, h) + (i0 + r) * d_q.token, s.width, 1.0f);
        }
    for (int64_t j = 0; j < s.keys; ++j) {
        write_row<Kind>(sum_k + j * wide, d_k.of(b, kv) + j * d_k.token, s.width, 1.0f);
        write_row<Kind>(sum_v + j * v_wide, d_v.of(b, kv) + j * d_v.token, s.value_width, 1.0f);
    }
}

// Bytes that one thread needs, with room for what alignment takes.
int64_t workspace(const Sizes& s, bool back) {
    const int64_t longest = up(s.keys, WIDTH), wide = up(s.width, WIDTH), v_wide = up(s.value_width, WIDTH);
    const int64_t words = back ? longest * (3 * wide + 2 * v_wide) + ROWS * (2 * wide + v_wide + 3 * COLUMNS)
                               : longest * (wide + v_wide) + ROWS * (v_wide + 2 * COLUMNS);
    return up(4 * words, 64) + 12 * 64;
}

// work(sequence, head of keys, workspace) for all of them.
template <class Work> void shared_out(const Sizes& s, bool back, void* memory, int threads, Work work) {
    const int64_t bytes = workspace(s, back);
#pragma omp parallel num_threads(threads)
    {
        Workspace space{static_cast<char*>(memory) + omp_get_thread_num() * bytes};
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * s.kv_heads; ++task) {
            space.used = 0;
            work(task / s.kv_heads, task % s.kv_heads, space);
        }
    }
}

template <class Kind>
void forward(const Sizes& s, const void* const* at, const int64_t* strides, float* log_sums, void* memory, int threads) {
    auto tensor = [&](int n) { return Tensor<Kind>(const_cast<void*>(at[n]), strides + 3 * n); };
    const auto q = tensor(0), k = tensor(1), v = tensor(2), out = tensor(3);
    shared_out(s, false, memory, threads, [&](int64_t b, int64_t kv, Workspace& space) {
        forward_head<Kind>(s, b, kv, q, k, v, out, log_sums, space);
    });
}

template <class Kind>
void backward(
    const Sizes& s, const void* const* at, const int64_t* strides, const float* log_sums, float* delta, void* memory,
    int threads) {
    auto tensor = [&](int n) { return Tensor<Kind>(const_cast<void*>(at[n]), strides + 3 * n); };
    const auto d_out = tensor(0), q = tensor(1), k = tensor(2), v = tensor(3), out = tensor(4);
    const auto d_q = tensor(5), d_k = tensor(6), d_v = tensor(7);
    shared_out(s, true, memory, threads, [&](int64_t b, int64_t kv, Workspace& space) {
        backward_head<Kind>(s, b, kv, d_out, q, k, v, out, log_sums, d_q, d_k, d_v, delta, space);
    });
}

Sizes sizes_of(const int64_t* n, float scale) { return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], scale}; }

}  // namespace

extern "C" {

// Whether one instruction multiplies pairs of bf16 numbers; else they are widened, which is slower than fp32.
int multiplies_bf16() {
#if defined(__AVX512BF16__) && !defined(VECTOR)
    return 1;
#else
    return 0;
#endif
}

// sizes: batch, heads, kv_heads, queries, keys, width, value_width, window (0: none).

// Bytes of memory that a thread needs, forward or backward.
int64_t attention_workspace(const int64_t* sizes, int back) { return workspace(sizes_of(sizes, 1.0f), back != 0); }

// at, strides: addresses of q, k, v, out, and three strides of each. log_sums: L / ln 2 per query, (batch, heads, queries), is written; +inf
// where nothing is read. memory: a workspace per thread, at a multiple of 64.
void attention_forward(
    const int64_t* sizes, float scale, const void* const* at, const int64_t* strides, float* log_sums, void* memory,
    int threads) {
    forward<Chosen>(sizes_of(sizes, scale), at, strides, log_sums, memory, threads);
}

// The same of d_out, q, k, v, out, d_q, d_k, d_v. delta: rowsum(d_out ∘ out), (batch, heads, queries), is written.
void attention_backward(
    const int64_t* sizes, float scale, const void* const* at, const int64_t* strides, const float* log_sums,
    float* delta, void* memory, int threads) {
    backward<Chosen>(sizes_of(sizes, scale), at, strides, log_sums, delta, memory, threads);
}
}
