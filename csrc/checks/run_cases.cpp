// Runs recorded cases of every native op and says which instruction set did it. Knows no Python and no torch, so it goes where
// they cannot: under an emulated CPU, a sanitizer, another architecture.
//
//     run_cases FILE                     every instruction set of this CPU in turn
//     run_cases FILE avx2 avx2           what dispatch chooses by itself, which must be these kernels and these loops
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <new>
#include <set>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "case_file.h"
#include "rsvlm/cell_means.h"
#include "rsvlm/complexity_map.h"
#include "rsvlm/cpu.h"
#include "rsvlm/cue_search.h"
#include "rsvlm/decode_attention.h"
#include "rsvlm/grouped_experts.h"
#include "rsvlm/pack_tiles.h"
#include "rsvlm/rms_norm.h"
#include "rsvlm/rope.h"
#include "rsvlm/route.h"
#include "rsvlm/varlen_tile_attention.h"
#include "rsvlm/weight_matmul.h"
#include "run_model.h"

namespace rsvlm::checks {
namespace {

HeadRows head_rows(const Case& c, const std::string& name) {
    return {c.array(name).data(), c.number(name + ".row_stride"), c.number(name + ".head_stride")};
}

BatchRows batch_rows(const Case& c, const std::string& name) {
    return {c.array(name).data(), c.number(name + ".batch_stride"), c.number(name + ".row_stride"),
            c.number(name + ".head_stride")};
}

void run_rms_norm(const Case& c, const Outputs& out) {
    rms_norm(c.array("x").data(), c.array("weight").data(), c.number("rows"), c.number("width"),
             static_cast<float>(c.numbers.at("eps")), c.array("x").element(), out.at("out").data());
}

void run_rope(const Case& c, const Outputs& out) {
    rope(c.array("x").data(), c.number("token_stride"), c.array("cosines").as<float>(), c.array("sines").as<float>(),
         c.number("tokens"), c.number("heads"), c.number("head_dim"), c.array("x").element(), out.at("out").data());
}

void run_route(const Case& c, const Outputs& out) {
    const RouteOutputs outputs{out.at("expert_offsets").as<std::int32_t>(), out.at("permutation").as<std::int32_t>(),
                               out.at("weights").as<float>()};
    route(c.array("logits").as<float>(), c.number("tokens"), c.number("experts"), c.integers("level_offsets"), c.number("k"),
          outputs);
}

void run_grouped_experts(const Case& c, const Outputs& out) {
    grouped_experts({c.array("x").data(), c.array("expert_offsets").as<std::int32_t>(),
                     c.array("permutation").as<std::int32_t>(), c.array("weights").as<float>(), c.data_or_null("w_gate"),
                     c.data_or_null("w_up"), c.array("w_down").data(), c.data_or_null("b_up"), c.data_or_null("b_down"),
                     out.at("out").data(), c.number("tokens"), c.number("width"), c.number("hidden"), c.number("experts"),
                     c.number("k"), c.array("x").element()});
}

void run_varlen_tile_attention(const Case& c, const Outputs& out) {
    const TileAttention call{
        head_rows(c, "q"), head_rows(c, "k"),    head_rows(c, "v"),      out.at("out").data(),
        c.number("heads"), c.number("head_dim"), c.array("q").element(), static_cast<float>(c.numbers.at("scale"))};
    varlen_tile_attention(call, c.integers("bounds"), c.integers("key_bounds"));
}

void run_decode_attention(const Case& c, const Outputs& out) {
    decode_attention({batch_rows(c, "q"), batch_rows(c, "k"), batch_rows(c, "v"), c.array("positions").as<std::int64_t>(),
                      static_cast<const bool*>(c.data_or_null("mask")), out.at("out").data(), c.number("batch"),
                      c.number("tokens"), c.number("heads"), c.number("kv_heads"), c.number("capacity"), c.number("head_dim"),
                      c.array("q").element()});
}

// A layout is made for the kernel and lies on a cache line, unlike what callers bring.
struct Layout {
    explicit Layout(std::size_t bytes) : memory(::operator new(bytes, kAlignment)) {}
    ~Layout() { ::operator delete(memory, kAlignment); }
    Layout(const Layout&) = delete;
    Layout& operator=(const Layout&) = delete;

    static constexpr std::align_val_t kAlignment{64};
    void* const memory;
};

void run_weight_matmul(const Case& c, const Outputs& out) {
    const std::map<std::string, WeightKind> kinds{
        {"bf16", WeightKind::kBf16}, {"int8", WeightKind::kInt8}, {"int4", WeightKind::kInt4}};
    const WeightShape shape{kinds.at(c.words.at("kind")), c.number("rows"), c.number("columns"), c.number("wide_scales") != 0};
    const Layout layout(static_cast<std::size_t>(weight_layout_bytes(shape)));
    lay_out_weight(shape, c.array("codes").data(), c.data_or_null("scales"), layout.memory);
    weight_matmul(shape, layout.memory, c.array("x").data(), c.number("tokens"), c.array("x").element(), out.at("out").data());
}

void run_cue_search(const Case& c, const Outputs& out) {
    const CueSearch call{c.array("visual").as<float>(),
                         static_cast<const float*>(c.data_or_null("query")),
                         c.array("entries").as<std::uint16_t>(),
                         c.number("views"),
                         c.number("width"),
                         c.number("count"),
                         c.number("k"),
                         c.numbers.at("beta")};
    const std::vector<Cue> found = cue_search(call);
    if (found.size() != out.at("rows").count()) {
        throw std::runtime_error("found " + std::to_string(found.size()) + " cues, expected " +
                                 std::to_string(out.at("rows").count()));
    }
    for (std::size_t i = 0; i < found.size(); ++i) {
        out.at("scores").as<float>()[i] = found[i].score;
        out.at("rows").as<std::int64_t>()[i] = found[i].row;
    }
}

void run_complexity_map(const Case& c, const Outputs& out) {
    complexity_map(c.array("gray").as<std::uint8_t>(), c.array("mask").as<std::uint8_t>(), c.number("height"),
                   c.number("width"), out.at("tables").as<double>());
}

void run_cell_means(const Case& c, const Outputs& out) {
    const std::map<std::string, Pixel> pixels{
        {"uint8", Pixel::kUint8},     {"int8", Pixel::kInt8},      {"uint16", Pixel::kUint16}, {"int16", Pixel::kInt16},
        {"uint32", Pixel::kUint32},   {"int32", Pixel::kInt32},    {"uint64", Pixel::kUint64}, {"int64", Pixel::kInt64},
        {"float32", Pixel::kFloat32}, {"float64", Pixel::kFloat64}};
    const std::int64_t factor = c.number("factor"), width = c.number("width"), height = c.number("height");
    const std::int64_t cols = (width + factor - 1) / factor, rows = (height + factor - 1) / factor;
    cell_means({pixels.at(c.array("values").type()), c.array("values").data(),
                static_cast<const std::uint8_t*>(c.data_or_null("valid")), c.number("valid_bands"), c.data_or_null("nodata"),
                c.number("bands"), height, width, factor, out.at("means").data(), rows * cols, cols,
                out.at("found").as<std::uint8_t>(), rows * cols, cols});
}

void run_pack_tiles(const Case& c, const Outputs& out) {
    const std::map<std::string, Resample> filters{
        {"bilinear", Resample::bilinear}, {"bicubic", Resample::bicubic}, {"lanczos", Resample::lanczos}};
    std::vector<Tile> tiles;
    for (std::int64_t t = 0; t < c.number("images"); ++t) {
        const std::string name = "image" + std::to_string(t);
        const std::vector<std::int64_t> p = c.integers(name + ".places");
        tiles.push_back(
            {{c.array(name).as<std::uint8_t>() + p[0], p[1], p[2], p[3]}, p[4], p[5], p[6], p[7], p[8], p[9], p[10] != 0});
    }
    PackOptions options{c.number("patch"), {}, {}, filters.at(c.words.at("filter")), {}};
    for (std::size_t i = 0; i < 3; ++i) {
        options.mean[i] = c.array("mean").as<float>()[i];
        options.std[i] = c.array("std").as<float>()[i];
        options.fill[i] = c.array("fill").as<std::uint8_t>()[i];
    }
    const std::size_t elements = static_cast<std::size_t>(count_patches(tiles, options) * 3 * options.patch * options.patch);
    if (elements != out.at("patches").count()) {
        throw std::runtime_error(std::to_string(elements) + " elements of patches, expected " +
                                 std::to_string(out.at("patches").count()));
    }
    pack_tiles(tiles, options, out.at("patches").as<float>());
}

const std::map<std::string, std::function<void(const Case&, const Outputs&)>> kOps{
    {"rms_norm", run_rms_norm},
    {"rope", run_rope},
    {"route", run_route},
    {"grouped_experts", run_grouped_experts},
    {"varlen_tile_attention", run_varlen_tile_attention},
    {"decode_attention", run_decode_attention},
    {"weight_matmul", run_weight_matmul},
    {"cue_search", run_cue_search},
    {"complexity_map", run_complexity_map},
    {"cell_means", run_cell_means},
    {"pack_tiles", run_pack_tiles},
    {"linear", run_linear},
    {"decoder", run_decoder},
    {"scene_model", run_scene_model},
};

void use_threads([[maybe_unused]] int count) {
#ifdef _OPENMP
    omp_set_num_threads(count);
#endif
}

// What went wrong, empty when nothing did: the result with one thread against the recorded one, then the bits of three threads.
std::string problem_of(const Case& recorded) {
    const auto& run = kOps.at(recorded.op);
    try {
        const Outputs alone = blank_outputs(recorded), together = blank_outputs(recorded);
        use_threads(1);
        run(recorded, alone);
        if (!recorded.refusal.empty()) {
            return "taken, expected a refusal with '" + recorded.refusal + "'";
        }
        const std::string wrong = difference(recorded, alone);
        if (!wrong.empty()) {
            return wrong;
        }
        use_threads(3);
        run(recorded, together);
        return same_bits(alone, together) ? "" : "other bits with three threads than with one";
    } catch (const std::invalid_argument& error) {
        const bool meant = !recorded.refusal.empty() && std::strstr(error.what(), recorded.refusal.c_str()) != nullptr;
        return meant ? "" : std::string("refused: ") + error.what();
    } catch (const std::exception& error) {
        return error.what();
    }
}

int run_all(const std::vector<Case>& cases) {
    int failed = 0;
    std::set<std::string> ops;
    for (const Case& recorded : cases) {
        ops.insert(recorded.op);
        const std::string problem = problem_of(recorded);
        if (!problem.empty()) {
            std::cout << "FAILED " << recorded.op << " " << recorded.label << ": " << problem << "\n";
            ++failed;
        }
    }
    std::cout << isa_name(kernel_isa()) << " kernels, " << isa() << " loops: " << cases.size() << " cases of " << ops.size()
              << " ops, " << failed << " failed" << std::endl;
    if (ops.size() != kOps.size()) {
        std::cout << "FAILED the cases leave out some of the " << kOps.size() << " ops\n";
    }
    return failed + (ops.size() == kOps.size() ? 0 : 1);
}

int check(int count, char** arguments) {
    if (count != 2 && count != 4) {
        std::cerr << "usage: run_cases FILE [KERNELS LOOPS]\n";
        return 2;
    }
    std::ifstream file(arguments[1], std::ios::binary);
    std::vector<Case> cases;
    while (auto recorded = read_case(file)) {
        cases.push_back(std::move(*recorded));
    }
    if (count == 4) {
        if (isa_name(kernel_isa()) != arguments[2] || isa() != arguments[3]) {
            std::cout << "FAILED dispatch chose " << isa_name(kernel_isa()) << " kernels and " << isa() << " loops, expected "
                      << arguments[2] << " and " << arguments[3] << " on this CPU\n";
            return 1;
        }
        return run_all(cases) == 0 ? 0 : 1;
    }
    int failed = 0;
    for (const char* name : {"portable", "avx2", "avx512", "avx512_bf16"}) {
        try {
            limit_isa(name);
        } catch (const std::invalid_argument&) {
            continue;  // not of this CPU
        }
        failed += run_all(cases);
    }
    return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace rsvlm::checks

int main(int count, char** arguments) {
    try {
        return rsvlm::checks::check(count, arguments);
    } catch (const std::exception& error) {
        std::cerr << "FAILED " << error.what() << "\n";
        return 1;
    }
}
