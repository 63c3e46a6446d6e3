// What kernels share over any vector type: exponentials, and stretches that do not fill a vector. Included inside an
// unnamed namespace, after the vectors of one instruction set.

template <class Scalar>
struct Constants;

template <>
struct Constants<float> {
    static constexpr float log2e = 0x1.715476p+0f;
    static constexpr float ln2_high = 0x1.62E43p-1f;
    static constexpr float ln2_low = -0x1.05C61p-29f;
    // Adding and subtracting it rounds to the nearest integer, for magnitudes below 2^22.
    static constexpr float rounder = 0x1.8p23f;
    // exp(t) = 1 + c1 t + c2 t^2 + ..., minimax on |t| <= ln(2) / 2.
    static constexpr float polynomial[] = {0x1.FFFFF6p-1f, 0x1.FFFDC6p-2f, 0x1.555A80p-3f, 0x1.573A1Ap-5f,
                                           0x1.0F9F9Cp-7f};
    // Below it exp(x) is 2^-(2^21) or less: what -inf is raised to, so that no infinity is subtracted from another.
    static constexpr float lowest = -0x1.62E4p20f;
    // exp(x - max) is below the smallest denormal number from here down.
    static constexpr float lowest_difference = -106.0f;
};

template <>
struct Constants<double> {
    static constexpr double log2e = 0x1.71547652b82fep+0;
    static constexpr double ln2_high = 0x1.62e42fefa39efp-1;
    static constexpr double ln2_low = 0x1.abc9e3b39803fp-56;
    static constexpr double rounder = 0x1.8p52;
    static constexpr double polynomial[] = {0x1.0000000000003p+0,  0x1.0000000000005p-1,  0x1.5555555554825p-3,
                                            0x1.55555555520edp-5,  0x1.111111137a350p-7,  0x1.6c16c17f35aafp-10,
                                            0x1.a019f624dccc3p-13, 0x1.a019a68ff59cfp-16, 0x1.71f610b693ddap-19,
                                            0x1.28a29f2174a1ap-22, 0x1.8ad03a702a2bdp-26};
    static constexpr double lowest = -0x1.62E4p20;
    static constexpr double lowest_difference = -747.0;
};

template <class V>
struct Exponential {
    V mantissa;
    V exponent;
};

// ExtExp of the paper. The product x * log2(e) is rounded to an integer in one step: rounding it to a float first, as
// two instructions would, moves t out of the polynomial's interval from |x| of about 1e5 on.
template <class V>
inline Exponential<V> extended_exponential(V x) {
    using C = Constants<typename V::Scalar>;
    const V rounder = V::set(C::rounder);
    const V n = multiply_add(x, V::set(C::log2e), rounder) - rounder;
    V t = multiply_add(n, V::set(-C::ln2_high), x);
    t = multiply_add(n, V::set(-C::ln2_low), t);
    constexpr int degree = sizeof(C::polynomial) / sizeof(C::polynomial[0]);
    V m = V::set(C::polynomial[degree - 1]);
    for (int k = degree - 2; k >= 0; --k) m = multiply_add(m, t, V::set(C::polynomial[k]));
    return {multiply_add(m, t, V::set(1)), n};
}

// exp(x - max), for the algorithms that subtract the maximum. NaN stays NaN, -inf becomes 0.
template <class V>
inline Exponential<V> shifted_exponential(V x, V max) {
    return extended_exponential(maximum(V::set(Constants<typename V::Scalar>::lowest_difference), x - max));
}

// ---- stretches that do not fill a vector ----

inline std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

template <class T>
inline T lowest_element();
template <>
inline float lowest_element<float>() { return -std::numeric_limits<float>::infinity(); }
template <>
inline double lowest_element<double>() { return -std::numeric_limits<double>::infinity(); }
template <>
inline BFloat16 lowest_element<BFloat16>() { return {0xFF80}; }
template <>
inline Float16 lowest_element<Float16>() { return {0xFC00}; }

// Vectors that have masked loads and stores come first (int), the others go through a buffer (long).
template <class V, class T>
inline auto load_some(const T* x, std::size_t count, T filling, int) -> decltype(V::load(x, count, filling)) {
    return V::load(x, count, filling);
}
template <class V, class T>
inline V load_some(const T* x, std::size_t count, T filling, long) {
    T buffer[V::width];
    for (int k = 0; k < V::width; ++k) buffer[k] = filling;
    std::memcpy(buffer, x, count * sizeof(T));
    return V::load(buffer);
}
// The first `count` elements, fewer than a vector has, and `filling` in the place of the others.
template <class V, class T>
inline V load_some(const T* x, std::size_t count, T filling) {
    return load_some<V>(x, count, filling, 0);
}

template <class V, class T>
inline auto store_some(V value, T* y, std::size_t count, int) -> decltype(value.store(y, count)) {
    value.store(y, count);
}
template <class V, class T>
inline void store_some(V value, T* y, std::size_t count, long) {
    T buffer[V::width];
    value.store(buffer);
    std::memcpy(y, buffer, count * sizeof(T));
}
template <class V, class T>
inline void store_some(V value, T* y, std::size_t count) {
    store_some(value, y, count, 0);
}

inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#endif
}
