// The same vectors in plain C++: arrays whose loops the compiler may vectorise. Included inside an unnamed namespace.

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float to_float(Float16 value) {
    const int exponent = (value.bits >> 10) & 0x1F;
    const float mantissa = static_cast<float>(value.bits & 0x3FF);
    float magnitude;
    if (exponent == 0) magnitude = std::ldexp(mantissa, -24);
    else if (exponent < 31) magnitude = std::ldexp(mantissa + 1024, exponent - 25);
    else magnitude = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
    return value.bits & 0x8000 ? -magnitude : magnitude;
}

inline void from_float(float value, float* p) { *p = value; }
inline void from_float(double value, double* p) { *p = value; }
inline void from_float(float value, BFloat16* p) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    p->bits = static_cast<std::uint16_t>(std::isnan(value) ? 0x7FC0 : rounded >> 16);
}
inline void from_float(float value, Float16* p) {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    std::uint32_t bits;
    if (std::isnan(value)) bits = 0x7E00;
    else if (magnitude >= 65520.0f) bits = 0x7C00;
    // Denormals are multiples of 2^-24; rounding up to 1024 of them gives the smallest normal number, as it should.
    else if (magnitude < 0x1p-14f) bits = static_cast<std::uint32_t>(std::nearbyint(magnitude * 0x1p24f));
    else {
        std::memcpy(&bits, &magnitude, sizeof bits);
        bits = (bits + 0xFFF + ((bits >> 13) & 1) - (112u << 23)) >> 13;
    }
    p->bits = static_cast<std::uint16_t>(sign | bits);
}

template <class Number, int lanes>
struct Array {
    using Scalar = Number;
    static constexpr int width = lanes;
    static constexpr int accumulators = 1;
    static constexpr int vectors_per_accumulator = 4;
    Number v[lanes];

    static Array set(Number value) {
        Array result;
        for (int k = 0; k < lanes; ++k) result.v[k] = value;
        return result;
    }
    template <class T>
    static Array load(const T* p) {
        Array result;
        for (int k = 0; k < lanes; ++k) result.v[k] = to_float(p[k]);
        return result;
    }
    template <class T>
    void store(T* p) const {
        for (int k = 0; k < lanes; ++k) from_float(v[k], p + k);
    }
    template <class T>
    void stream(T* p) const {
        store(p);
    }
    Number sum() const {
        Number result = v[0];
        for (int k = 1; k < lanes; ++k) result += v[k];
        return result;
    }
    Number maximum() const {
        Number result = v[0];
        for (int k = 1; k < lanes; ++k) result = v[k] > result ? v[k] : result;
        return result;
    }
};

template <class Number, int lanes>
inline Array<Number, lanes> operator+(Array<Number, lanes> a, const Array<Number, lanes>& b) {
    for (int k = 0; k < lanes; ++k) a.v[k] += b.v[k];
    return a;
}
template <class Number, int lanes>
inline Array<Number, lanes> operator-(Array<Number, lanes> a, const Array<Number, lanes>& b) {
    for (int k = 0; k < lanes; ++k) a.v[k] -= b.v[k];
    return a;
}
template <class Number, int lanes>
inline Array<Number, lanes> operator*(Array<Number, lanes> a, const Array<Number, lanes>& b) {
    for (int k = 0; k < lanes; ++k) a.v[k] *= b.v[k];
    return a;
}
// One rounding: the reduction of the argument needs the exact product.
template <class Number, int lanes>
inline Array<Number, lanes> multiply_add(Array<Number, lanes> a, const Array<Number, lanes>& b,
                                         const Array<Number, lanes>& c) {
    for (int k = 0; k < lanes; ++k) a.v[k] = std::fma(a.v[k], b.v[k], c.v[k]);
    return a;
}
// Where one is NaN: b.
template <class Number, int lanes>
inline Array<Number, lanes> maximum(Array<Number, lanes> a, const Array<Number, lanes>& b) {
    for (int k = 0; k < lanes; ++k) a.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k];
    return a;
}

inline void power_of_two(float exponent, float* result) {
    const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<int>(exponent) + 127) << 23;
    std::memcpy(result, &bits, sizeof bits);
}
inline void power_of_two(double exponent, double* result) {
    const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<int>(exponent) + 1023) << 52;
    std::memcpy(result, &bits, sizeof bits);
}
// a * 2^exponent for integers <= 0; below the normal numbers it is 0.
template <class Number, int lanes>
inline Array<Number, lanes> scale(Array<Number, lanes> a, const Array<Number, lanes>& exponent) {
    constexpr Number least = std::numeric_limits<Number>::min_exponent - 2;
    for (int k = 0; k < lanes; ++k) {
        // A NaN exponent belongs to a NaN, which stays one whatever it is multiplied by.
        Number power;
        power_of_two(exponent.v[k] > least ? exponent.v[k] : least, &power);
        a.v[k] *= power;
    }
    return a;
}
// a * 2^exponent * factor with denormal results, for factors of at least 2^-60: the power is taken 2^60 too large, and
// the last product alone is rounded to a denormal.
template <class Number, int lanes>
inline Array<Number, lanes> scale_gradually(const Array<Number, lanes>& a, const Array<Number, lanes>& exponent,
                                            const Array<Number, lanes>& factor) {
    using Lanes = Array<Number, lanes>;
    return scale(a, exponent + Lanes::set(60)) * (factor * Lanes::set(static_cast<Number>(0x1p-60)));
}

using Floats = Array<float, 8>;
using Doubles = Array<double, 4>;
