// Softmax passes over one stretch of a row, as templates over a vector type. Included inside an unnamed namespace,
// after the vectors of one instruction set and what is common to them, by one source file for each instruction set.
//
// The two-pass algorithm (Dukhan and Ablavatski, arXiv 2001.04438) keeps every exponential as an unevaluated pair
// (m, n), exp(x) = m * 2^n, with n an integer stored in a floating-point number, so that nothing can overflow.

// Streaming stores go to addresses that are a multiple of the vector: how many elements come before the first.
template <class V, class T>
inline std::size_t elements_to_alignment(const T* y) {
    constexpr std::uintptr_t bytes = V::width * sizeof(T);
    const std::uintptr_t misaligned = reinterpret_cast<std::uintptr_t>(y) % bytes;
    return misaligned ? (bytes - misaligned) / sizeof(T) : 0;
}

// y = function(x) or function(x, z), element by element. `streams` writes past the caches.
template <class V, class T, class Function, class... Inputs>
inline void map(std::size_t size, T* y, bool streams, Function function, const Inputs*... x) {
    std::size_t i = 0;
    if (streams) {
        const std::size_t head = smaller(size, elements_to_alignment<V>(y));
        if (head) store_some(function(load_some<V>(x, head, Inputs{})...), y, head);
        for (i = head; i + V::width <= size; i += V::width) function(V::load(x + i)...).stream(y + i);
    } else {
        for (; i + V::width <= size; i += V::width) function(V::load(x + i)...).store(y + i);
    }
    if (i < size) store_some(function(load_some<V>(x + i, size - i, Inputs{})...), y + i, size - i);
}

// Sum of function(x) or function(x, z) over a stretch, by independent accumulators. The function gives 0 for `filling`.
template <class V, class T, class Function, class... Inputs>
inline V accumulate(std::size_t size, T filling, Function function, const Inputs*... x) {
    constexpr int ways = 4;
    V sums[ways];
    for (int k = 0; k < ways; ++k) sums[k] = V::set(0);
    std::size_t i = 0;
    for (; i + ways * V::width <= size; i += ways * V::width)
        for (int k = 0; k < ways; ++k) sums[k] = sums[k] + function(V::load(x + i + k * V::width)...);
    for (; i + V::width <= size; i += V::width) sums[0] = sums[0] + function(V::load(x + i)...);
    if (i < size) sums[1] = sums[1] + function(load_some<V>(x + i, size - i, filling)...);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// ---- two-pass ----

template <class V>
struct PairAccumulator {
    V mantissa = V::set(0);
    V exponent = V::set(2 * Constants<typename V::Scalar>::lowest);

    // Adds pairs with one rescaling of the accumulator: the greatest exponent of the block comes first.
    template <int count>
    void add(const Exponential<V> (&pairs)[count]) {
        V greatest = exponent;
        for (int k = 0; k < count; ++k) greatest = maximum(greatest, pairs[k].exponent);
        // The block's own sum comes first too: small numbers would be lost one by one in a large accumulator.
        V sum = scale(pairs[0].mantissa, pairs[0].exponent - greatest);
        for (int k = 1; k < count; ++k) sum = sum + scale(pairs[k].mantissa, pairs[k].exponent - greatest);
        mantissa = scale(mantissa, exponent - greatest) + sum;
        exponent = greatest;
    }

    Total total() const {
        const typename V::Scalar greatest = exponent.maximum();
        return {scale(mantissa, exponent - V::set(greatest)).sum(), greatest};
    }
};

// exp(x) as a pair, with -inf (and what is as good as it) raised to where its pair is finite and its weight is 0.
template <class V>
inline Exponential<V> bounded_exponential(V x) {
    return extended_exponential(maximum(V::set(Constants<typename V::Scalar>::lowest), x));
}

template <class V, class T>
Total sum_pairs(const void* input, std::size_t size) {
    const T* x = static_cast<const T*>(input);
    constexpr int ways = V::accumulators;
    constexpr int each = V::vectors_per_accumulator;
    PairAccumulator<V> accumulators[ways];
    std::size_t i = 0;
    for (; i + ways * each * V::width <= size; i += ways * each * V::width) {
        for (int k = 0; k < ways; ++k) {
            Exponential<V> pairs[each];
            for (int j = 0; j < each; ++j)
                pairs[j] = bounded_exponential(V::load(x + i + (k * each + j) * V::width));
            accumulators[k].add(pairs);
        }
    }
    for (; i < size; i += V::width) {
        const V value = i + V::width <= size ? V::load(x + i) : load_some<V>(x + i, size - i, lowest_element<T>());
        const Exponential<V> pair[1] = {bounded_exponential(value)};
        accumulators[0].add(pair);
    }
    Exponential<V> rest[ways];
    PairAccumulator<V> all;
    for (int k = 0; k < ways; ++k) rest[k] = {accumulators[k].mantissa, accumulators[k].exponent};
    all.add(rest);
    return all.total();
}

template <class V>
struct NormalisePair {
    V reciprocal, exponent;
    V operator()(V x) const {
        const Exponential<V> pair = bounded_exponential(x);
        return scale_gradually(pair.mantissa, pair.exponent - exponent, reciprocal);
    }
};

template <class V, class T>
void write_pairs(const void* x, void* y, std::size_t size, Total total, bool streams) {
    using Scalar = typename V::Scalar;
    const NormalisePair<V> normalise{V::set(static_cast<Scalar>(1 / total.mantissa)),
                                     V::set(static_cast<Scalar>(total.exponent))};
    map<V>(size, static_cast<T*>(y), streams, normalise, static_cast<const T*>(x));
}

// ---- three-pass and online: the rivals, which subtract the maximum ----

template <class V, class T>
double find_maximum(const void* input, std::size_t size) {
    const T* x = static_cast<const T*>(input);
    constexpr int ways = 4;
    V greatest[ways];
    for (int k = 0; k < ways; ++k) greatest[k] = V::set(-std::numeric_limits<typename V::Scalar>::infinity());
    std::size_t i = 0;
    for (; i + ways * V::width <= size; i += ways * V::width)
        for (int k = 0; k < ways; ++k) greatest[k] = maximum(V::load(x + i + k * V::width), greatest[k]);
    for (; i < size; i += V::width) {
        const V value = i + V::width <= size ? V::load(x + i) : load_some<V>(x + i, size - i, lowest_element<T>());
        greatest[0] = maximum(value, greatest[0]);
    }
    return maximum(maximum(greatest[0], greatest[1]), maximum(greatest[2], greatest[3])).maximum();
}

template <class V>
struct ShiftedExponential {
    V max;
    V operator()(V x) const {
        const Exponential<V> pair = shifted_exponential(x, max);
        return scale(pair.mantissa, pair.exponent);
    }
};

template <class V, class T>
double sum_shifted(const void* x, std::size_t size, double max) {
    const ShiftedExponential<V> exponential{V::set(static_cast<typename V::Scalar>(max))};
    return accumulate<V>(size, lowest_element<T>(), exponential, static_cast<const T*>(x)).sum();
}

// The row's next elements come from memory while these keep the processor busy.
constexpr int elements_ahead = 4096;

template <class V, class T>
double store_shifted(const void* input, void* output, std::size_t size, double max, bool streams) {
    const T* x = static_cast<const T*>(input);
    T* y = static_cast<T*>(output);
    const V greatest = V::set(static_cast<typename V::Scalar>(max));
    const auto exponential = [&](V value) {
        const Exponential<V> pair = shifted_exponential(value, greatest);
        return scale_gradually(pair.mantissa, pair.exponent, V::set(1));
    };
    constexpr int ways = 4;
    V sums[ways];
    for (int k = 0; k < ways; ++k) sums[k] = V::set(0);
    std::size_t i = streams ? smaller(size, elements_to_alignment<V>(y)) : 0;
    if (i) {
        sums[0] = exponential(load_some<V>(x, i, lowest_element<T>()));
        store_some(sums[0], y, i);
    }
    for (; i + ways * V::width <= size; i += ways * V::width) {
        for (int k = 0; k < ways; ++k) {
            prefetch(x + i + k * V::width + elements_ahead);
            const V value = exponential(V::load(x + i + k * V::width));
            if (streams) value.stream(y + i + k * V::width);
            else value.store(y + i + k * V::width);
            sums[k] = sums[k] + value;
        }
    }
    for (; i + V::width <= size; i += V::width) {
        const V value = exponential(V::load(x + i));
        value.store(y + i);
        sums[0] = sums[0] + value;
    }
    if (i < size) {
        const V value = exponential(load_some<V>(x + i, size - i, lowest_element<T>()));
        store_some(value, y + i, size - i);
        sums[1] = sums[1] + value;
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

template <class V>
struct NormaliseShifted {
    V reciprocal, max;
    V operator()(V x) const {
        const Exponential<V> pair = shifted_exponential(x, max);
        return scale_gradually(pair.mantissa, pair.exponent, reciprocal);
    }
};

template <class V, class T>
void write_shifted(const void* x, void* y, std::size_t size, double max, double sum, bool streams) {
    using Scalar = typename V::Scalar;
    const NormaliseShifted<V> normalise{V::set(static_cast<Scalar>(1 / sum)), V::set(static_cast<Scalar>(max))};
    map<V>(size, static_cast<T*>(y), streams, normalise, static_cast<const T*>(x));
}

template <class V>
struct Multiply {
    V factor;
    V operator()(V x) const { return x * factor; }
};

template <class V, class T>
void divide(const void* x, void* y, std::size_t size, double sum, bool streams) {
    const Multiply<V> multiply{V::set(static_cast<typename V::Scalar>(1 / sum))};
    map<V>(size, static_cast<T*>(y), streams, multiply, static_cast<const T*>(x));
}

// How many vectors share a rescaling.
constexpr int group_vectors = 8;

// Running maximum and rescaled sum (Milakov and Gimelshein, arXiv 1805.02867), one rescaling a block.
template <class V>
struct OnlineSum {
    V sum = V::set(0);
    V greatest = V::set(std::numeric_limits<typename V::Scalar>::lowest());

    template <int count>
    void add(const V (&x)[count]) {
        const V before = greatest;
        for (int k = 0; k < count; ++k) greatest = maximum(x[k], greatest);
        V group = V::set(0);
        for (int k = 0; k < count; ++k) group = group + ShiftedExponential<V>{greatest}(x[k]);
        sum = multiply_add(sum, ShiftedExponential<V>{greatest}(before), group);
    }
};

template <class V, class T>
Shifted sum_online(const void* input, std::size_t size) {
    const T* x = static_cast<const T*>(input);
    constexpr int count = group_vectors;
    OnlineSum<V> online;
    std::size_t i = 0;
    for (; i + count * V::width <= size; i += count * V::width) {
        V group[count];
        for (int k = 0; k < count; ++k) group[k] = V::load(x + i + k * V::width);
        online.add(group);
    }
    for (; i < size; i += V::width) {
        const V single[1] = {i + V::width <= size ? V::load(x + i)
                                                  : load_some<V>(x + i, size - i, lowest_element<T>())};
        online.add(single);
    }
    const typename V::Scalar max = online.greatest.maximum();
    return {(online.sum * ShiftedExponential<V>{V::set(max)}(online.greatest)).sum(), max};
}

// ---- logarithm and gradients ----

template <class V>
struct SubtractTwoParts {
    V high, low;
    V operator()(V x) const { return (x - high) - low; }
};

// x - (high + low), where x - high is exact for the elements that matter, so that the result has the precision of x.
template <class V, class T>
void subtract(const void* x, void* y, std::size_t size, double high, double low, bool streams) {
    using Scalar = typename V::Scalar;
    const Scalar first = static_cast<Scalar>(high + low);
    const Scalar second = static_cast<Scalar>((high - first) + low);
    const SubtractTwoParts<V> subtraction{V::set(first), V::set(second)};
    map<V>(size, static_cast<T*>(y), streams, subtraction, static_cast<const T*>(x));
}

template <class V>
struct Product {
    V operator()(V a, V b) const { return a * b; }
};

template <class V, class T>
double dot(const void* g, const void* y, std::size_t size) {
    return accumulate<V>(size, T{}, Product<V>{}, static_cast<const T*>(g), static_cast<const T*>(y)).sum();
}

template <class V>
struct Itself {
    V operator()(V a) const { return a; }
};

template <class V, class T>
double sum(const void* g, std::size_t size) {
    return accumulate<V>(size, T{}, Itself<V>{}, static_cast<const T*>(g)).sum();
}

template <class V>
struct SoftmaxGradient {
    V inner;
    V operator()(V g, V y) const { return y * (g - inner); }
};

template <class V, class T>
void write_gradient(const void* g, const void* y, void* out, std::size_t size, double inner, bool streams) {
    const SoftmaxGradient<V> gradient{V::set(static_cast<typename V::Scalar>(inner))};
    map<V>(size, static_cast<T*>(out), streams, gradient, static_cast<const T*>(g), static_cast<const T*>(y));
}

template <class V>
struct LogSoftmaxGradient {
    V total;
    V operator()(V g, V y) const { return g - ShiftedExponential<V>{V::set(0)}(y) * total; }
};

template <class V, class T>
void write_log_gradient(const void* g, const void* y, void* out, std::size_t size, double total, bool streams) {
    const LogSoftmaxGradient<V> gradient{V::set(static_cast<typename V::Scalar>(total))};
    map<V>(size, static_cast<T*>(out), streams, gradient, static_cast<const T*>(g), static_cast<const T*>(y));
}

template <class V, class T>
constexpr SoftmaxKernels kernels_of() {
    return {
        sum_pairs<V, T>,      write_pairs<V, T>, find_maximum<V, T>, sum_shifted<V, T>, store_shifted<V, T>,
        write_shifted<V, T>,  divide<V, T>,      sum_online<V, T>,   subtract<V, T>,    dot<V, T>,
        write_gradient<V, T>, sum<V, T>,         write_log_gradient<V, T>,
    };
}

constexpr SoftmaxKernels kernels[] = {
    kernels_of<Floats, float>(),
    kernels_of<Floats, BFloat16>(),
    kernels_of<Floats, Float16>(),
    kernels_of<Doubles, double>(),
};
