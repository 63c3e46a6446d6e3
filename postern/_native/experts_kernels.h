// Products of an expert's rows and weights as templates over a vector type. Included inside an unnamed namespace, after
// the vectors of one instruction set, what is common to them and the activations, by one source file for each.

// With 32 registers 12 rows at 2 vectors, with 16 registers 6 at 2: the sums, the weights and one number of a row stay in
// registers, and a few are left to read ahead.
constexpr std::size_t rows_at_once = Floats::width == 16 ? 12 : 6;
constexpr std::size_t vectors_at_once = 2;

template <class V>
void pack(const float* weights, std::size_t vector_pitch, std::size_t weight_pitch, bool is_gated, std::size_t panels,
          std::size_t depth, float* packed) {
    constexpr std::size_t panel = vectors_at_once * V::width;
    const std::size_t columns = is_gated ? panel / 2 : panel;
    for (std::size_t k = 0; k < depth; ++k, weights += weight_pitch, packed += panel)
        for (std::size_t p = 0; p < panels; ++p)
            for (std::size_t v = 0; v < vectors_at_once; ++v)
                V::load(weights + p * columns + v * vector_pitch).store(packed + p * panel * depth + v * V::width);
}

template <class V, std::size_t rows, std::size_t vectors>
inline void add_product(const float* chunk, const float* weights, std::size_t vector_pitch, V (&sums)[rows][vectors]) {
    V weight[vectors];
    for (std::size_t v = 0; v < vectors; ++v) weight[v] = V::load(weights + v * vector_pitch);
    for (std::size_t r = 0; r < rows; ++r) {
        const V x = V::set(chunk[r * chunk_pitch]);
        for (std::size_t v = 0; v < vectors; ++v) sums[r][v] = multiply_add(x, weight[v], sums[r][v]);
    }
}

template <class V, std::size_t rows, std::size_t vectors>
inline void add_packed(const ExpertTile& tile, V (&sums)[rows][vectors]) {
    constexpr std::size_t step = vectors * V::width;
    const float* weights = tile.weights;
    const float* chunk = tile.rows;
    for (std::size_t first = 0; first < tile.depth; first += chunk_features, chunk += rows_at_once * chunk_pitch) {
        const std::size_t features = smaller(tile.depth - first, chunk_features);
        std::size_t k = 0;
        // four at a time: what is not a product takes the products' places in the pipes
        for (; k + 4 <= features; k += 4, weights += 4 * step) {
            add_product(chunk + k, weights, V::width, sums);
            add_product(chunk + k + 1, weights + step, V::width, sums);
            add_product(chunk + k + 2, weights + 2 * step, V::width, sums);
            add_product(chunk + k + 3, weights + 3 * step, V::width, sums);
        }
        for (; k < features; ++k, weights += step) add_product(chunk + k, weights, V::width, sums);
    }
}

template <class V, std::size_t rows, std::size_t vectors>
inline void add_in_place(const ExpertTile& tile, V (&sums)[rows][vectors]) {
    constexpr std::size_t ahead = 8;
    const float* weights = tile.weights;
    for (std::size_t k = 0; k < tile.depth; ++k, weights += tile.weight_pitch) {
        for (std::size_t v = 0; v < vectors; ++v)
            prefetch(weights + v * tile.vector_pitch + (tile.is_gated ? ahead / 2 : ahead) * V::width);
        add_product(tile.rows + k, weights, tile.vector_pitch, sums);
    }
}

template <class V, std::size_t rows, std::size_t vectors>
inline void start(const ExpertTile& tile, V (&sums)[rows][vectors]) {
    for (std::size_t v = 0; v < vectors; ++v) {
        const V bias = tile.biases ? V::load(tile.biases + v * tile.vector_pitch) : V::set(0);
        for (std::size_t r = 0; r < rows; ++r) sums[r][v] = bias;
    }
}

// Writes to the outputs, from a column on.
template <class V, std::size_t rows, std::size_t vectors>
inline void finish(const ExpertTile& tile, const V (&sums)[rows][vectors], std::size_t column) {
    const std::size_t written = tile.is_gated ? vectors / 2 : vectors;
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t v = 0; v < vectors; ++v) {
            if (v == written || v * V::width >= tile.columns) break;
            V value = activated(sums[r][v], tile.activation);
            if (tile.is_gated) value = value * sums[r][v + vectors / 2];
            float* output = tile.outputs[r] + column + v * V::width;
            const std::size_t columns = tile.columns - v * V::width;
            if (columns >= V::width) {
                value.store(output);
            } else {
                store_some(value, output, columns);
            }
        }
    }
}

template <class V, std::size_t rows, std::size_t vectors>
void multiply_packed(const ExpertTile& tile) {
    if constexpr (rows > 1) {
        if (tile.count < rows) return multiply_packed<V, rows - 1, vectors>(tile);
    }
    V sums[rows][vectors];
    start(tile, sums);
    add_packed(tile, sums);
    finish(tile, sums, 0);
}

template <class V, std::size_t rows, std::size_t vectors>
void multiply_in_place(const ExpertTile& tiles) {
    if constexpr (rows > 1) {
        if (tiles.count < rows) return multiply_in_place<V, rows - 1, vectors>(tiles);
    }
    ExpertTile tile = tiles;
    for (std::size_t panel = 0; panel < tiles.panels; ++panel) {
        V sums[rows][vectors];
        if (tile.is_first) {
            start(tile, sums);
        } else {
            for (std::size_t r = 0; r < rows; ++r)
                for (std::size_t v = 0; v < vectors; ++v) sums[r][v] = V::load(tile.sums + (r * vectors + v) * V::width);
        }
        add_in_place(tile, sums);
        if (tile.is_last) {
            finish(tile, sums, panel * tile.columns);
        } else {
            for (std::size_t r = 0; r < rows; ++r)
                for (std::size_t v = 0; v < vectors; ++v) sums[r][v].store(tile.sums + (r * vectors + v) * V::width);
        }
        tile.weights += tile.columns;
        if (tile.biases) tile.biases += tile.columns;
        tile.sums += rows * vectors * V::width;
    }
}

constexpr ExpertKernels kernels{Floats::width, rows_at_once, vectors_at_once, pack<Floats>,
                                multiply_packed<Floats, rows_at_once, vectors_at_once>,
                                multiply_in_place<Floats, rows_at_once, vectors_at_once>};
