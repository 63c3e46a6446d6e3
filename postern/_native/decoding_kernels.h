// Attention of few queries over a stretch of keys, and flat matrix products, as templates over a vector type. Included
// inside an unnamed namespace, after the vectors of one instruction set and what is common to them, by one source file
// for each instruction set.
//
// Both forms of attention go over the keys in the same blocks with the same products. The synchronised one looks for
// the greatest logit of a block and rescales its sums where that has grown; the unified one (FlashDecoding++, arXiv
// 2311.01282) subtracts a constant.

// Keys of a block: their logits stay in the first-level cache, and with a head of usual size the keys do too.
constexpr std::size_t key_block = 64;

// Rows of keys or values that will be needed next. They lie too far apart, block by block, for the processor to guess.
template <class T, int count>
inline void prefetch_rows(const T* rows, std::ptrdiff_t stride, std::size_t dim) {
    constexpr std::size_t line = 64 / sizeof(T);
    for (int i = 0; i < count; ++i)
        for (std::size_t d = 0; d < dim; d += line) prefetch(rows + i * stride + d);
}

template <class V, class T, int count>
inline void dot_products(const float* query, const T* key, std::ptrdiff_t stride, std::size_t dim, float* logits) {
    V sums[count];
    for (int i = 0; i < count; ++i) sums[i] = V::set(0);
    std::size_t d = 0;
    for (; d + V::width <= dim; d += V::width) {
        const V q = V::load(query + d);
        for (int i = 0; i < count; ++i) sums[i] = multiply_add(q, V::load(key + i * stride + d), sums[i]);
    }
    if (d < dim) {
        const V q = load_some<V>(query + d, dim - d, 0.0f);
        for (int i = 0; i < count; ++i)
            sums[i] = multiply_add(q, load_some<V>(key + i * stride + d, dim - d, T{}), sums[i]);
    }
    for (int i = 0; i < count; ++i) logits[i] = sums[i].sum();
}

// sum += weights * values
template <class V, class T, int count>
inline void add_values(const float* weights, const T* value, std::ptrdiff_t stride, std::size_t dim, float* sum) {
    V w[count];
    for (int i = 0; i < count; ++i) w[i] = V::set(weights[i]);
    std::size_t d = 0;
    for (; d + V::width <= dim; d += V::width) {
        V total = V::load(sum + d);
        for (int i = 0; i < count; ++i) total = multiply_add(w[i], V::load(value + i * stride + d), total);
        total.store(sum + d);
    }
    if (d < dim) {
        V total = load_some<V>(sum + d, dim - d, 0.0f);
        for (int i = 0; i < count; ++i)
            total = multiply_add(w[i], load_some<V>(value + i * stride + d, dim - d, T{}), total);
        store_some(total, sum + d, dim - d);
    }
}

// exp(x - origin), bounded by e^87 and so finite; below e^-87 it may be 0. NaN stays NaN.
template <class V>
inline V bounded_difference_exponential(V x, V origin) {
    const V below = maximum(V::set(-87), origin - x);
    const Exponential<V> pair =
        extended_exponential(maximum(V::set(Constants<typename V::Scalar>::lowest_difference), V::set(0) - below));
    return scale(pair.mantissa, pair.exponent);
}

// logits = exp(logits - origin); returns their sum.
template <class V>
inline float exponentials(float* logits, float origin) {
    V sum = V::set(0);
    for (std::size_t i = 0; i < key_block; i += V::width) {
        const V weight = bounded_difference_exponential(V::load(logits + i), V::set(origin));
        weight.store(logits + i);
        sum = sum + weight;
    }
    return sum.sum();
}

template <class V>
inline float greatest_of(const float* logits) {
    V greatest = V::load(logits);
    for (std::size_t i = V::width; i < key_block; i += V::width) greatest = maximum(V::load(logits + i), greatest);
    return greatest.maximum();
}

// The logits of a block of keys; -inf in the place of those that may not be attended to, and past the end.
template <class V, class T>
inline void block_logits(const KeyChunk& chunk, std::size_t group, std::size_t first, std::size_t count,
                         float* logits) {
    const float* query = chunk.query + group * chunk.head_dim;
    const T* key = static_cast<const T*>(chunk.key) + static_cast<std::ptrdiff_t>(first) * chunk.key_stride;
    constexpr int at_once = 4;
    std::size_t j = 0;
    const T* value = static_cast<const T*>(chunk.value) + static_cast<std::ptrdiff_t>(first) * chunk.value_stride;
    for (; j + at_once <= count; j += at_once) {
        if (group == 0)
            prefetch_rows<T, at_once>(value + static_cast<std::ptrdiff_t>(j) * chunk.value_stride, chunk.value_stride,
                                      chunk.value_dim);
        dot_products<V, T, at_once>(query, key + static_cast<std::ptrdiff_t>(j) * chunk.key_stride, chunk.key_stride,
                                    chunk.head_dim, logits + j);
    }
    for (; j < count; ++j)
        dot_products<V, T, 1>(query, key + static_cast<std::ptrdiff_t>(j) * chunk.key_stride, chunk.key_stride,
                              chunk.head_dim, logits + j);
    for (; j < key_block; ++j) logits[j] = -std::numeric_limits<float>::infinity();
    if (!chunk.mask) return;
    const unsigned char* mask = chunk.mask + static_cast<std::ptrdiff_t>(group) * chunk.mask_group_stride +
                                static_cast<std::ptrdiff_t>(first) * chunk.mask_key_stride;
    for (j = 0; j < count; ++j)
        if (!mask[static_cast<std::ptrdiff_t>(j) * chunk.mask_key_stride])
            logits[j] = -std::numeric_limits<float>::infinity();
}

template <class V, class T>
inline void add_block(const KeyChunk& chunk, std::size_t group, std::size_t first, std::size_t count,
                      const float* weights, float* sum) {
    const T* value = static_cast<const T*>(chunk.value) + static_cast<std::ptrdiff_t>(first) * chunk.value_stride;
    const T* next = static_cast<const T*>(chunk.key) + static_cast<std::ptrdiff_t>(first + key_block) * chunk.key_stride;
    const bool is_followed = group == 0 && first + 2 * key_block <= chunk.keys;
    constexpr int at_once = 8;
    std::size_t j = 0;
    for (; j + at_once <= count; j += at_once) {
        if (is_followed)
            prefetch_rows<T, at_once>(next + static_cast<std::ptrdiff_t>(j) * chunk.key_stride, chunk.key_stride,
                                      chunk.head_dim);
        add_values<V, T, at_once>(weights + j, value + static_cast<std::ptrdiff_t>(j) * chunk.value_stride,
                                  chunk.value_stride, chunk.value_dim, sum);
    }
    for (; j < count; ++j)
        add_values<V, T, 1>(weights + j, value + static_cast<std::ptrdiff_t>(j) * chunk.value_stride,
                            chunk.value_stride, chunk.value_dim, sum);
}

inline void clear(const KeyChunk& chunk, const Partial& partial) {
    for (std::size_t i = 0; i < chunk.groups * chunk.value_dim; ++i) partial.numerator[i] = 0;
    for (std::size_t group = 0; group < chunk.groups; ++group) {
        partial.denominator[group] = 0;
        // finite, as no infinity is subtracted from another
        partial.origin[group] = std::numeric_limits<float>::lowest();
        partial.leaves[group] = 0;
    }
}

// Minus infinity stands for a masked key, which is not tested.
inline bool leaves_range(const float* logits, std::size_t count, const Range& range) {
    int leaves = 0;
    for (std::size_t j = 0; j < count; ++j) {
        const float z = logits[j] - range.phi;
        leaves |= (z >= range.high) | ((z <= range.low) & (z > -std::numeric_limits<float>::infinity()));
    }
    return leaves != 0;
}

// Both forms, so that they differ in what is written here and in nothing that a compiler decides.
template <class V, class T, bool is_unified>
void attend(const KeyChunk& chunk, const Range& range, const Partial& partial) {
    clear(chunk, partial);
    float logits[key_block];
    for (std::size_t first = 0; first < chunk.keys; first += key_block) {
        const std::size_t count = smaller(key_block, chunk.keys - first);
        for (std::size_t group = 0; group < chunk.groups; ++group) {
            float* numerator = partial.numerator + group * chunk.value_dim;
            float origin = range.phi;
            if constexpr (is_unified) {
                if (partial.leaves[group]) continue;
                block_logits<V, T>(chunk, group, first, count, logits);
                if (range.is_checked && leaves_range(logits, count, range)) {
                    partial.leaves[group] = 1;
                    continue;
                }
            } else {
                block_logits<V, T>(chunk, group, first, count, logits);
                const float before = partial.origin[group];
                origin = greatest_of<V>(logits);
                if (origin > before) {
                    float factor[V::width];
                    bounded_difference_exponential(V::set(before), V::set(origin)).store(factor);
                    partial.denominator[group] *= factor[0];
                    for (std::size_t d = 0; d < chunk.value_dim; ++d) numerator[d] *= factor[0];
                    partial.origin[group] = origin;
                } else {
                    origin = before;
                }
            }
            partial.denominator[group] += exponentials<V>(logits, origin);
            add_block<V, T>(chunk, group, first, count, logits, numerator);
        }
    }
}

// ---- flat products ----

// Rows whose sums stay in registers, in stripes of two vectors: 16 of AVX-512's 32 registers, 8 of AVX2's 16.
template <class V>
constexpr int rows_at_once = V::width >= 16 ? 8 : 4;
// Weights of so many inputs stay in the second-level cache while the rows of a block take turns.
constexpr std::size_t inner_block = 1024;

// out [rows, panel_width] += x [inner, x_stride]^T * weights [inner, panel_width], a stripe of the columns.
template <class V, class T, int rows>
inline void multiply_stripe(const float* x, std::size_t x_stride, const T* weights, float* out, std::size_t inner) {
    V sums[rows][2];
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < 2; ++n) sums[m][n] = V::load(out + m * panel_width + n * V::width);
    for (std::size_t k = 0; k < inner; ++k) {
        const V first = V::load(weights + k * panel_width), second = V::load(weights + k * panel_width + V::width);
        for (int m = 0; m < rows; ++m) {
            const V factor = V::set(x[k * x_stride + m]);
            sums[m][0] = multiply_add(factor, first, sums[m][0]);
            sums[m][1] = multiply_add(factor, second, sums[m][1]);
        }
    }
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < 2; ++n) sums[m][n].store(out + m * panel_width + n * V::width);
}

template <class V, class T, int rows>
inline void multiply_rows(std::size_t count, const float* x, std::size_t x_stride, const T* weights, float* out,
                          std::size_t inner) {
    if constexpr (rows > 1) {
        if (count < rows) return multiply_rows<V, T, rows - 1>(count, x, x_stride, weights, out, inner);
    }
    for (std::size_t column = 0; column < panel_width; column += 2 * V::width)
        multiply_stripe<V, T, rows>(x, x_stride, weights + column, out + column, inner);
}

template <class V, class T>
void multiply_panel(const float* x, const void* packed, float* out, std::size_t rows, std::size_t inner) {
    const T* weights = static_cast<const T*>(packed);
    for (std::size_t i = 0; i < rows * panel_width; ++i) out[i] = 0;
    for (std::size_t first = 0; first < inner; first += inner_block) {
        const std::size_t count = smaller(inner_block, inner - first);
        for (std::size_t row = 0; row < rows; row += rows_at_once<V>)
            multiply_rows<V, T, rows_at_once<V>>(smaller(rows_at_once<V>, rows - row), x + first * rows + row, rows,
                                                 weights + first * panel_width, out + row * panel_width, count);
    }
}

template <class V, class T>
constexpr DecodingKernels kernels_of() {
    return {attend<V, T, false>, attend<V, T, true>, multiply_panel<V, T>};
}

constexpr DecodingKernels kernels[] = {
    kernels_of<Floats, float>(),
    kernels_of<Floats, BFloat16>(),
    kernels_of<Floats, Float16>(),
};
