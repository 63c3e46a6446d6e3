// The greedy selection of Soft-NMS (arXiv 1704.04503) in double precision, group by group.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "export.h"
#include "threads.h"

namespace postern {
namespace {

// Codes in the C interface; `postern.boxes._selection` passes the same numbers.
enum class Decay : int { gaussian = 0, linear = 1, hard = 2 };

struct Box {
    double x1, y1, x2, y2;
};

struct Candidate {
    Box box;
    double area;
    double score;
    std::size_t index;
};

struct Selection {
    double score_threshold;
    double margin;  // added to each width and height
    std::int64_t max_out;

    double area(const Box& box) const { return (box.x2 - box.x1 + margin) * (box.y2 - box.y1 + margin); }

    // 0 for boxes that do not meet, which are most.
    double overlap(const Candidate& a, const Candidate& b) const {
        const double width = std::min(a.box.x2, b.box.x2) - std::max(a.box.x1, b.box.x1) + margin;
        if (!(width > 0)) return 0;
        const double height = std::min(a.box.y2, b.box.y2) - std::max(a.box.y1, b.box.y1) + margin;
        if (!(height > 0)) return 0;
        const double intersection = width * height;
        return intersection / (a.area + b.area - intersection);
    }

    // A box of score 0 is no longer there. Candidates stay in the order of their indices, so that the first of
    // several equal scores is the one with the lowest index.
    template <class Factor>
    void run(const Box* boxes, const double* scores, double* selected, std::size_t size, Factor&& factor) const {
        std::vector<Candidate> candidates;
        candidates.reserve(size);
        std::size_t best = 0;
        for (std::size_t index = 0; index < size; ++index) {
            selected[index] = 0;
            if (!(scores[index] >= score_threshold && scores[index] > 0)) continue;
            if (!candidates.empty() && scores[index] > candidates[best].score) best = candidates.size();
            candidates.push_back({boxes[index], area(boxes[index]), scores[index], index});
        }
        for (std::int64_t count = 0; count < max_out && !candidates.empty(); ++count) {
            const Candidate chosen = candidates[best];
            selected[chosen.index] = chosen.score;
            std::size_t kept = 0;
            std::size_t next_best = 0;
            for (std::size_t k = 0; k < candidates.size(); ++k) {
                if (k == best) continue;
                const double iou = overlap(chosen, candidates[k]);
                double score = candidates[k].score;
                if (iou > 0) {
                    score *= factor(iou);
                    if (!(score >= score_threshold && score > 0)) continue;
                }
                if (kept != k) candidates[kept] = candidates[k];
                candidates[kept].score = score;
                if (score > candidates[next_best].score) next_best = kept;
                ++kept;
            }
            candidates.resize(kept);
            best = next_best;
        }
    }
};

}  // namespace
}  // namespace postern

// Selects boxes [size, 4] within each group; group g is boxes starts[g] to starts[g + 1]. Writes for each box the score
// with which it was selected, or 0 where it was not. At most max_out boxes of each group are selected.
// Returns 0, or 1 where memory ran out.
POSTERN_EXPORT int postern_soft_nms(int decay, const double* boxes, const double* scores, double* selected,
                                    const std::int64_t* starts, std::int64_t groups, double iou_threshold,
                                    double sigma, double score_threshold, std::int64_t max_out, double margin,
                                    int threads) {
    using namespace postern;
    try {
        const Selection selection{score_threshold, margin, max_out};
        parallel_for(static_cast<std::size_t>(groups), threads, [&](std::size_t group) {
            const std::size_t first = static_cast<std::size_t>(starts[group]);
            const std::size_t size = static_cast<std::size_t>(starts[group + 1]) - first;
            const Box* own = reinterpret_cast<const Box*>(boxes) + first;
            switch (static_cast<Decay>(decay)) {
                case Decay::gaussian:
                    selection.run(own, scores + first, selected + first, size,
                                  [sigma](double iou) { return std::exp(iou * iou * (-1 / sigma)); });
                    break;
                case Decay::linear:
                    selection.run(own, scores + first, selected + first, size, [iou_threshold](double iou) {
                        return iou <= iou_threshold ? 1.0 : 1.0 - iou;
                    });
                    break;
                case Decay::hard:
                    selection.run(own, scores + first, selected + first, size,
                                  [iou_threshold](double iou) { return iou <= iou_threshold ? 1.0 : 0.0; });
                    break;
            }
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
