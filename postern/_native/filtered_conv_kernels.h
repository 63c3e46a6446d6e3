// Sums over channels and taps as a template over a vector type. Included inside an unnamed namespace, after the vectors
// of one instruction set, by one source file for each.
//
// The weights of the filters that are on are read where they lie, one number at a time, and multiply whole vectors of
// outputs: so nothing is gathered, and any number of filters and channels runs at the same speed.

// With 32 registers 6 filters at 4 vectors, with 16 at 2: the sums, the inputs and one weight stay in registers.
constexpr int filters_at_once = 6;
constexpr int vectors_at_once = Floats::width / 4;

template <class V>
inline V finished(V sum, const Finish& finish) {
    // NaN stays
    const V value = maximum(V::set(finish.low), sum);
    const V zero = V::set(0);
    return finish.high < std::numeric_limits<float>::infinity()
               ? zero - maximum(V::set(-finish.high), zero - value)
               : value;
}

template <class V, int filters, int vectors>
void multiply_tile(const FilterTile& tile) {
    if constexpr (filters > 1) {
        if (tile.filters < filters) return multiply_tile<V, filters - 1, vectors>(tile);
    }
    if constexpr (vectors > 1) {
        if (tile.vectors < vectors) return multiply_tile<V, filters, vectors - 1>(tile);
    }
    V sums[filters][vectors];
    const float* weights[filters];
    std::size_t places[vectors];
    for (int f = 0; f < filters; ++f) weights[f] = tile.weights[f];
    for (int v = 0; v < vectors; ++v) places[v] = tile.places[v];
    for (int f = 0; f < filters; ++f)
        for (int v = 0; v < vectors; ++v) sums[f][v] = V::set(0);
    const float* plane = tile.planes;
    for (std::size_t k = 0; k < tile.channel_count; ++k, plane += tile.plane_size) {
        const std::size_t first = tile.channels[k] * tile.taps;
        for (std::size_t tap = 0; tap < tile.taps; ++tap) {
            const float* seen = plane + tile.tap_offsets[tap];
            V x[vectors];
            for (int v = 0; v < vectors; ++v) x[v] = V::load(seen + places[v]);
            for (int f = 0; f < filters; ++f) {
                const V weight = V::set(weights[f][first + tap]);
                for (int v = 0; v < vectors; ++v) sums[f][v] = multiply_add(weight, x[v], sums[f][v]);
            }
        }
    }
    for (int f = 0; f < filters; ++f) {
        const V shift = V::set(tile.shifts[f]);
        for (int v = 0; v < vectors; ++v) {
            if (tile.pixels[v] == scattered) {
                sums[f][v].store(tile.sums + (f * vectors + v) * V::width);
                continue;
            }
            const std::size_t offset = tile.offsets[f] + tile.pixels[v];
            V sum = sums[f][v] + shift;
            if (tile.finish.residual) sum = sum + V::load(tile.finish.residual + offset);
            finished(sum, tile.finish).store(tile.output + offset);
        }
    }
}

template <class V>
void write_row(const float* sums, float shift, const Finish& finish, float* output, std::size_t offset,
               std::size_t count) {
    const float* residual = finish.residual ? finish.residual + offset : nullptr;
    const V shifts = V::set(shift);
    std::size_t k = 0;
    for (; k + V::width <= count; k += V::width) {
        V sum = V::load(sums + k) + shifts;
        if (residual) sum = sum + V::load(residual + k);
        finished(sum, finish).store(output + offset + k);
    }
    if (k == count) return;
    V sum = load_some<V>(sums + k, count - k, 0.0f) + shifts;
    if (residual) sum = sum + load_some<V>(residual + k, count - k, 0.0f);
    store_some(finished(sum, finish), output + offset + k, count - k);
}

constexpr FilteredConvKernels kernels{Floats::width, filters_at_once, vectors_at_once,
                                      multiply_tile<Floats, filters_at_once, vectors_at_once>, write_row<Floats>};
