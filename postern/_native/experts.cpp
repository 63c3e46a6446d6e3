// A bank of feed-forward experts on the tokens that are assigned to each: y = W2 act(W1 x + b1) + b2, or gated
// W2 (act(W1 x + b1) * (V x + c)) + b2, in float32.
//
// Rows are read where the tokens lie and written where their assignment lies; what is hidden between the two products
// stays in the cache. Where an expert has many rows, its weights are copied into panels of a few columns, a strip of
// panels at a time, and a panel stays in the first-level cache while the rows pass. Where it has few, copying would take
// longer than multiplying: the weights stream past the rows as they lie.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "experts.h"
#include "export.h"
#include "instruction_set.h"
#include "threads.h"

namespace postern {
namespace {

const ExpertKernels* expert_kernels() {
#ifdef POSTERN_X86
    if (instruction_set() == InstructionSet::avx512) return &experts_avx512;
    if (instruction_set() == InstructionSet::avx2) return &experts_avx2;
#endif
    return nullptr;
}

// In the order of the C interface.
struct Sizes {
    std::int64_t assignments, top_k, experts, width, hidden, is_gated, activation;
};

struct Operands {
    const float* tokens;         // [assignments / top_k, width]
    const std::int64_t* order;   // [assignments], sorted by expert: assignment a is of token a / top_k
    const std::int64_t* ends;    // [experts], of each expert's assignments in the order
    const float* expand;         // [experts, width, hidden], gated [experts, width, 2 hidden] with the gates first
    const float* contract;       // [experts, hidden, width]
    const float* expand_bias;    // [experts, hidden or 2 hidden]; null for none
    const float* contract_bias;  // [experts, width]; null for none
    float* output;               // [assignments, width]; 0 for those that no expert has
};

// Of the rows that are worked on together: they and what is hidden of them stay in the second-level cache.
constexpr std::size_t least_blocks = 4, most_blocks = 24, rows_size = 384 * 1024;
// With so few blocks the weights are read where they lie, so many features at once: a processor follows no more streams.
constexpr std::size_t blocks_in_place = 2, features_in_place = 8;
// Of the weights that are copied together: long runs are read faster, and all of a strip stays in that cache.
constexpr std::size_t strip_columns = 256, strip_size = 128 * 1024;

std::size_t divided_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
std::size_t bound(std::size_t part, std::size_t parts, std::size_t whole) { return part * whole / parts; }

// Memory of the calling thread, which keeps it: to have the system map and clear it for each call would take longer
// than copying the rows.
float* scratch(std::size_t size) {
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local std::size_t held = 0;
    if (held < size) {
        held = 0;
        memory.reset();
        memory.reset(new float[size]);
        held = size;
    }
    return memory.get();
}

// Rows in blocks of as many as a tile takes, each block in chunks: where their features lie.
class Blocks {
public:
    const std::size_t count, rows;

    Blocks(const ExpertKernels& kernels, std::size_t row_count)
        : count(divided_up(row_count, kernels.rows_at_once)), rows(row_count), chunk_(kernels.rows_at_once * chunk_pitch) {}

    std::size_t first(std::size_t block) const { return bound(block, count, rows); }
    // Of one block.
    std::size_t size(std::size_t features) const { return divided_up(features, chunk_features) * chunk_; }
    // From a row's start.
    std::size_t place(std::size_t feature) const {
        return feature / chunk_features * chunk_ + feature % chunk_features;
    }

private:
    const std::size_t chunk_;
};

// One of the two products of an expert.
struct Product {
    const float* weights;        // [depth, halves of columns]
    const float* biases;         // likewise; null for none
    std::size_t depth, columns;  // columns of the output
    bool is_gated;
    Activation activation;
};

class Multiplication {
public:
    Multiplication(const ExpertKernels& kernels, const Product& product, const Blocks& blocks)
        : kernels_(kernels), product_(product), blocks_(blocks), halves_(product.is_gated ? 2 : 1),
          panel_(kernels.vectors_at_once * kernels.width), columns_(panel_ / halves_), biases_(panel_),
          targets_(blocks.rows) {
        tile_.is_gated = product.is_gated;
        tile_.activation = product.activation;
    }

    // How much memory it takes.
    std::size_t memory() const {
        return std::max(strip_panels() * panel_ * product_.depth, product_.columns * halves_ * rows_in_place());
    }

    // Each row's outputs lie at the places of columns: in chunks as the next product reads them, or side by side.
    void run(const float* rows, float* const* outputs, bool is_chunked, float* memory) {
        rows_ = rows;
        outputs_ = outputs;
        is_chunked_ = is_chunked;
        // only whole panels can be read in place
        const std::size_t in_place = rows_in_place() ? product_.columns / columns_ * columns_ : 0;
        if (in_place) run_in_place(in_place, memory);
        const std::size_t strip = strip_panels() * columns_;
        for (std::size_t first = in_place; first < product_.columns; first += strip)
            run_strip(first, std::min(product_.columns, first + strip), memory);
    }

private:
    std::size_t rows_in_place() const { return blocks_.count <= blocks_in_place ? blocks_.rows : 0; }

    std::size_t strip_panels() const {
        return std::clamp<std::size_t>(strip_size / (product_.depth * panel_), 1, strip_columns / panel_);
    }

    void run_in_place(std::size_t end, float* sums) {
        tile_.vector_pitch = product_.is_gated ? product_.columns : kernels_.width;
        tile_.weight_pitch = halves_ * product_.columns;
        tile_.columns = columns_;
        for (std::size_t feature = 0; feature < product_.depth; feature += features_in_place) {
            tile_.depth = std::min(features_in_place, product_.depth - feature);
            tile_.is_first = feature == 0;
            tile_.is_last = feature + tile_.depth == product_.depth;
            for (std::size_t column = 0; column < end; column += chunk_features) {
                tile_.panels = std::min(chunk_features, end - column) / columns_;
                tile_.weights = product_.weights + feature * tile_.weight_pitch + column;
                tile_.biases = product_.biases ? product_.biases + column : nullptr;
                aim(column);
                for (std::size_t block = 0; block < blocks_.count; ++block) {
                    aim(block, blocks_.place(feature));
                    tile_.sums = sums + column * halves_ * blocks_.rows + tile_.panels * blocks_.first(block) * panel_;
                    kernels_.multiply_in_place(tile_);
                }
            }
        }
    }

    void run_strip(std::size_t first, std::size_t end, float* packed) {
        pack(first, end, packed);
        tile_.depth = product_.depth;
        tile_.vector_pitch = kernels_.width;
        for (std::size_t column = first; column < end; column += columns_) {
            tile_.columns = std::min(columns_, end - column);
            tile_.weights = packed + (column - first) / columns_ * panel_ * product_.depth;
            if (product_.biases) {
                for (std::size_t half = 0; half < halves_; ++half)
                    std::copy_n(product_.biases + half * product_.columns + column, tile_.columns,
                                biases_.data() + half * columns_);
                tile_.biases = biases_.data();
            }
            aim(column);
            for (std::size_t block = 0; block < blocks_.count; ++block) {
                aim(block, 0);
                kernels_.multiply_packed(tile_);
            }
        }
    }

    // Sets where the rows' outputs from a column on are.
    void aim(std::size_t column) {
        const std::size_t offset = is_chunked_ ? blocks_.place(column) : column;
        for (std::size_t row = 0; row < blocks_.rows; ++row) targets_[row] = outputs_[row] + offset;
    }

    // Sets the rows and their outputs.
    void aim(std::size_t block, std::size_t offset) {
        tile_.rows = rows_ + block * blocks_.size(product_.depth) + offset;
        tile_.count = blocks_.first(block + 1) - blocks_.first(block);
        tile_.outputs = targets_.data() + blocks_.first(block);
    }

    // Columns from `first` to `end` in panels, [panels, depth, halves, columns], with zeros beyond the last.
    void pack(std::size_t first, std::size_t end, float* packed) const {
        const std::size_t pitch = halves_ * product_.columns, full = (end - first) / columns_;
        kernels_.pack(product_.weights + first, product_.is_gated ? product_.columns : kernels_.width, pitch,
                      product_.is_gated, full, product_.depth, packed);
        const std::size_t column = first + full * columns_;
        if (column == end) return;
        float* target = packed + full * panel_ * product_.depth;
        for (std::size_t k = 0; k < product_.depth; ++k)
            for (std::size_t half = 0; half < halves_; ++half, target += columns_) {
                const float* source = product_.weights + k * pitch + half * product_.columns + column;
                std::fill(std::copy_n(source, end - column, target), target + columns_, 0.0f);
            }
    }

    const ExpertKernels& kernels_;
    const Product product_;
    const Blocks& blocks_;
    // A panel's columns, with those of both halves, and how many columns of the output they make.
    const std::size_t halves_, panel_, columns_;
    std::vector<float> biases_;
    std::vector<float*> targets_;
    ExpertTile tile_{};
    const float* rows_ = nullptr;
    float* const* outputs_ = nullptr;
    bool is_chunked_ = false;
};

class ExpertBank {
public:
    ExpertBank(const ExpertKernels& kernels, const Sizes& sizes, const Operands& operands)
        : kernels_(kernels), operands_(operands), assignments_(static_cast<std::size_t>(sizes.assignments)),
          top_k_(static_cast<std::size_t>(sizes.top_k)), experts_(static_cast<std::size_t>(sizes.experts)),
          width_(static_cast<std::size_t>(sizes.width)), hidden_(static_cast<std::size_t>(sizes.hidden)),
          is_gated_(sizes.is_gated != 0), activation_(static_cast<Activation>(sizes.activation)) {}

    // Whether all assignments exist, and each expert's end where it began or later.
    bool is_sound() const {
        std::int64_t start = 0;
        for (std::size_t expert = 0; expert < experts_; start = operands_.ends[expert++])
            if (operands_.ends[expert] < start) return false;
        return start <= static_cast<std::int64_t>(assignments_) &&
               std::all_of(operands_.order, operands_.order + assignments_, [&](std::int64_t assignment) {
                   return assignment >= 0 && assignment < static_cast<std::int64_t>(assignments_);
               });
    }

    void run(int threads) const {
        const auto used = static_cast<std::size_t>(operands_.ends[experts_ - 1]);
        // enough items to keep all threads busy to the end
        const std::size_t share = threads > 1 ? used / (4 * static_cast<std::size_t>(threads)) : used;
        const std::size_t block = kernels_.rows_at_once * (width_ + hidden_);
        const std::size_t most = std::clamp(rows_size / block, least_blocks, most_blocks);
        const std::size_t rows = kernels_.rows_at_once * std::clamp(share / kernels_.rows_at_once, least_blocks, most);
        std::vector<Item> items;
        for (std::size_t expert = 0, start = 0; expert < experts_; ++expert) {
            const std::size_t count = static_cast<std::size_t>(operands_.ends[expert]) - start;
            const std::size_t parts = divided_up(count, rows);
            for (std::size_t part = 0; part < parts; ++part)
                items.push_back({expert, start + bound(part, parts, count), start + bound(part + 1, parts, count)});
            start += count;
        }
        parallel_for(items.size(), threads, [&](std::size_t index) { run(items[index]); });
        for (std::size_t row = used; row < assignments_; ++row)
            std::fill_n(operands_.output + static_cast<std::size_t>(operands_.order[row]) * width_, width_, 0.0f);
    }

private:
    // Rows of one expert, in the order.
    struct Item {
        std::size_t expert, first, end;
    };

    void run(const Item& item) const {
        const Blocks blocks(kernels_, item.end - item.first);
        const std::size_t expanded = is_gated_ ? 2 * hidden_ : hidden_;
        const auto own = [&](const float* all, std::size_t size) { return all ? all + item.expert * size : nullptr; };
        Multiplication expand(kernels_,
                              {own(operands_.expand, width_ * expanded), own(operands_.expand_bias, expanded), width_,
                               hidden_, is_gated_, activation_},
                              blocks);
        Multiplication contract(kernels_,
                                {own(operands_.contract, hidden_ * width_), own(operands_.contract_bias, width_),
                                 hidden_, width_, false, Activation::identity},
                                blocks);
        const std::size_t row_size = blocks.size(width_), hidden_size = blocks.size(hidden_);
        float* rows = scratch(blocks.count * (row_size + hidden_size) + std::max(expand.memory(), contract.memory()));
        float* hidden = rows + blocks.count * row_size;
        float* memory = hidden + blocks.count * hidden_size;
        std::vector<float*> inner, outer;
        for (std::size_t block = 0; block < blocks.count; ++block)
            for (std::size_t row = blocks.first(block); row < blocks.first(block + 1); ++row) {
                const std::size_t offset = (row - blocks.first(block)) * chunk_pitch;
                const auto assignment = static_cast<std::size_t>(operands_.order[item.first + row]);
                const float* token = operands_.tokens + assignment / top_k_ * width_;
                for (std::size_t feature = 0; feature < width_; feature += chunk_features)
                    std::copy_n(token + feature, std::min(chunk_features, width_ - feature),
                                rows + block * row_size + offset + blocks.place(feature));
                inner.push_back(hidden + block * hidden_size + offset);
                outer.push_back(operands_.output + assignment * width_);
            }
        expand.run(rows, inner.data(), true, memory);
        contract.run(hidden, outer.data(), false, memory);
    }

    const ExpertKernels& kernels_;
    const Operands operands_;
    const std::size_t assignments_, top_k_, experts_, width_, hidden_;
    const bool is_gated_;
    const Activation activation_;
};

}  // namespace
}  // namespace postern

// What each expert makes of the tokens that are assigned to it: see `Operands` and, for the sizes, `Sizes`. All numbers
// are dense float32. Returns 0, 1 where memory ran out, 2 where the chosen instructions have no vectors, 3 where the
// order or the ends name assignments that do not exist.
POSTERN_EXPORT int postern_experts(const float* tokens, const std::int64_t* order, const std::int64_t* ends,
                                   const float* expand, const float* contract, const float* expand_bias,
                                   const float* contract_bias, float* output, const std::int64_t* sizes, int threads) {
    using namespace postern;
    const ExpertKernels* kernels = expert_kernels();
    if (kernels == nullptr) return 2;
    try {
        Sizes own;
        std::memcpy(&own, sizes, sizeof own);
        const Operands operands{tokens, order, ends, expand, contract, expand_bias, contract_bias, output};
        const ExpertBank bank(*kernels, own, operands);
        if (!bank.is_sound()) return 3;
        bank.run(threads);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
