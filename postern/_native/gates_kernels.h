// Gates as templates over a vector type. Included inside an unnamed namespace, after the vectors of one instruction set,
// what is common to them and the activations, by one source file for each.

// act(gates) * values.
template <class V>
void gate(const float* gates, const float* values, float* output, std::size_t size, Activation activation) {
    std::size_t i = 0;
    for (; i + V::width <= size; i += V::width)
        (activated(V::load(gates + i), activation) * V::load(values + i)).store(output + i);
    if (i == size) return;
    const V gate = load_some<V>(gates + i, size - i, 0.0f), value = load_some<V>(values + i, size - i, 0.0f);
    store_some(activated(gate, activation) * value, output + i, size - i);
}

// Its gradients.
template <class V>
void gate_backward(const float* grad, const float* gates, const float* values, float* of_gates, float* of_values,
                   std::size_t size, Activation activation) {
    std::size_t i = 0;
    for (; i + V::width <= size; i += V::width) {
        const V g = V::load(grad + i), x = V::load(gates + i);
        (g * V::load(values + i) * derivative(x, activation)).store(of_gates + i);
        (g * activated(x, activation)).store(of_values + i);
    }
    if (i == size) return;
    const std::size_t rest = size - i;
    const V g = load_some<V>(grad + i, rest, 0.0f), x = load_some<V>(gates + i, rest, 0.0f);
    store_some(g * load_some<V>(values + i, rest, 0.0f) * derivative(x, activation), of_gates + i, rest);
    store_some(g * activated(x, activation), of_values + i, rest);
}

constexpr GateKernels kernels{gate<Floats>, gate_backward<Floats>};
