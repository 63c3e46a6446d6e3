// Activations and their derivatives as templates over a vector type. Included inside an unnamed namespace, after the
// vectors of one instruction set and what is common to them.

// |x|, but for infinity, of which no multiple of 0 is a number: 128, where exp(-|x|) is 0 as well.
template <class V>
inline V magnitude(V x) {
    const V size = maximum(V::set(0) - x, x);
    return V::set(0) - maximum(V::set(-128), V::set(0) - size);
}

template <class V>
inline V exponential_of_minus(V x) {
    const Exponential<V> pair = shifted_exponential(V::set(0) - x, V::set(0));
    return scale(pair.mantissa, pair.exponent);
}

// 1 / (1 + exp(|x|)), of which the function and its derivative are made without an overflow or a cancellation.
template <class V>
inline V sigmoid_of_minus(V size) {
    const V small = exponential_of_minus(size);
    return small / (V::set(1) + small);
}

// x / (1 + exp(-x)).
template <class V>
inline V silu(V x) {
    const V size = magnitude(x);
    return maximum(V::set(0), x) - size * sigmoid_of_minus(size);
}

template <class V>
inline V silu_derivative(V x) {
    const V size = magnitude(x), tail = sigmoid_of_minus(size);
    const V bend = tail - size * tail * (V::set(1) - tail);
    return where_negative(x, bend, V::set(1) - bend);
}

// exp(-x^2 / 2), and erfc(|x| / sqrt(2)) / 2 by 7.1.26 of Abramowitz and Stegun, from |x|.
template <class V>
struct Normal {
    V bell, tail;
};

template <class V>
inline Normal<V> normal(V size) {
    constexpr float terms[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
    const V t = V::set(1) / multiply_add(V::set(0.3275911f * 0.70710678f), size, V::set(1));
    V sum = V::set(terms[4]);
    for (int k = 3; k >= 0; --k) sum = multiply_add(sum, t, V::set(terms[k]));
    const V bell = exponential_of_minus(V::set(0.5f) * size * size);
    return {bell, V::set(0.5f) * t * sum * bell};
}

// x Phi(x).
template <class V>
inline V gelu(V x) {
    const V size = magnitude(x);
    return maximum(V::set(0), x) - size * normal(size).tail;
}

template <class V>
inline V gelu_derivative(V x) {
    const V size = magnitude(x);
    const Normal<V> at = normal(size);
    const V bend = at.tail - V::set(0.39894228f) * size * at.bell;
    return where_negative(x, bend, V::set(1) - bend);
}

template <class V>
inline V activated(V x, Activation activation) {
    switch (activation) {
        case Activation::relu: return maximum(V::set(0), x);
        case Activation::silu: return silu(x);
        case Activation::gelu: return gelu(x);
        default: return x;
    }
}

template <class V>
inline V derivative(V x, Activation activation) {
    switch (activation) {
        case Activation::relu: return where_negative(V::set(0) - x, V::set(1), V::set(0));
        case Activation::silu: return silu_derivative(x);
        case Activation::gelu: return gelu_derivative(x);
        default: return V::set(1);
    }
}
