#include "run_model.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <sstream>

#include "rsvlm/decoder.h"
#include "rsvlm/linear.h"
#include "rsvlm/scene_model.h"
#include "rsvlm/settings.h"

namespace rsvlm::checks {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Release {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
};

std::vector<std::string> split(const std::string& text, char between) {
    std::vector<std::string> parts;
    std::istringstream words(text);
    for (std::string part; std::getline(words, part, between);) {
        parts.push_back(part);
    }
    return parts;
}

// The weights of a case, each where it ends with its memory, on a cache line as a package has them.
class Weights {
  public:
    explicit Weights(const Case& recorded) {
        const std::vector<std::string> int8_inputs = split(recorded.words.at("int8_inputs"), ',');
        for (const auto& [path, array] : recorded.arrays) {
            const std::vector<std::string> parts = split(path, '/');
            if (parts.size() != 5 || parts[0] != "weight") {
                continue;
            }
            char* memory = static_cast<char*>(::operator new(array.bytes(), kAlignment));
            memory_.emplace_back(memory);
            std::memcpy(memory, array.data(), array.bytes());
            const std::int64_t rows = std::stoll(parts[2]), columns = std::stoll(parts[3]);
            if (parts[1] == "vector") {
                table_.add_vector(parts[4], reinterpret_cast<const float*>(memory), rows);
            } else if (parts[1] == "raw") {
                table_.add_raw(parts[4], memory, rows);
            } else {
                Linear linear{linear_kind(parts[1]), rows, columns, memory};
                linear.int8_inputs = rounds_inputs(linear.kind, parts[4], int8_inputs);
                table_.add_linear(parts[4], linear);
            }
        }
    }

    const WeightTable& table() const { return table_; }

  private:
    std::vector<std::unique_ptr<char, Release>> memory_;
    WeightTable table_;
};

Element cache_element(const Case& recorded) {
    return recorded.words.at("cache") == "float32" ? Element::kFloat32 : Element::kBfloat16;
}

// A copy on the boundary that numpy's arrays have.
std::vector<float> floats(const Case& recorded, const std::string& name) {
    const Array& array = recorded.array(name);
    return {array.as<float>(), array.as<float>() + array.count()};
}

void keep(const std::vector<float>& values, const Outputs& out, const std::string& name) {
    const Array& to = out.at(name);
    if (to.count() != values.size()) {
        throw std::runtime_error(name + " has " + std::to_string(values.size()) + " values, expected " +
                                 std::to_string(to.count()));
    }
    std::copy(values.begin(), values.end(), to.as<float>());
}

std::size_t sized(std::int64_t a, std::int64_t b) { return static_cast<std::size_t>(a * b); }

}  // namespace

void run_linear(const Case& recorded, const Outputs& out) {
    const Weights weights(recorded);
    const std::int64_t tokens = recorded.number("tokens");
    const Linear linear = weights.table().linear("linear", recorded.number("rows"), recorded.number("columns"));
    const std::int64_t padded = padded_columns(linear.columns);
    const std::vector<float> x = floats(recorded, "x");
    std::vector<float> few(sized(tokens, linear.rows)), many(few.size()), wide(sized(tokens, padded), 0.0f);
    std::vector<float> scratch(static_cast<std::size_t>(few_scratch_floats(linear.columns, tokens)));
    const Operand operand = operand_of(linear);
    const std::int64_t row_bytes = operand_row_bytes(operand, linear.columns);
    std::vector<char> rows(sized(tokens, row_bytes));
    for (std::int64_t n = 0; n < tokens; ++n) {
        std::copy_n(x.data() + n * linear.columns, linear.columns, wide.data() + n * padded);
        write_operand_row(operand, x.data() + n * linear.columns, linear.columns, rows.data() + n * row_bytes);
    }
    const std::int64_t blocks = linear_blocks(linear);
    multiply_few(linear, wide.data(), tokens, 0, blocks / 2, few.data(), scratch.data());
    multiply_few(linear, wide.data(), tokens, blocks / 2, blocks, few.data(), scratch.data());
    multiply_many(linear, {rows.data(), operand, tokens, 1}, {many.data(), linear.rows});
    keep(few, out, "few");
    keep(many, out, "many");
}

void run_decoder(const Case& recorded, const Outputs& out) {
    const Weights weights(recorded);
    Decoder decoder(decoder_shape(recorded.numbers, floats(recorded, "frequencies"), cache_element(recorded)), weights.table());
    const DecoderShape& shape = decoder.shape();
    const std::vector<std::int64_t> lengths = recorded.integers("lengths");
    const auto rows = static_cast<std::int64_t>(lengths.size());
    std::vector<PrefillRow> prompts;
    std::vector<DecodeRow> step, guesses;
    std::int64_t tokens = 0, longest = 0;
    const std::vector<std::int64_t> fed = recorded.integers("fed");
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t length = lengths[static_cast<std::size_t>(row)];
        prompts.push_back({row, 0, length});
        step.push_back({row, length, static_cast<std::int32_t>(fed[static_cast<std::size_t>(row)])});
        tokens += length;
        longest = std::max(longest, length);
    }
    for (std::int64_t place = 0; place < 3; ++place) {  // of the first row, in one step
        guesses.push_back({0, lengths[0] + 1 + place, static_cast<std::int32_t>(fed[static_cast<std::size_t>(rows + place)])});
    }
    KvCache cache(shape, rows, longest + 4);
    const std::vector<std::int64_t> given = recorded.integers("ids");
    const std::vector<std::int32_t> ids(given.begin(), given.end());
    std::vector<float> embeddings(sized(tokens, shape.hidden)), states(sized(rows, shape.hidden));
    std::vector<float> logits(sized(rows, shape.vocabulary)), guessed(sized(3, shape.vocabulary)), best_logits(3);
    decoder.embed(ids.data(), tokens, embeddings.data());
    decoder.prefill(cache, prompts.data(), rows, embeddings.data(), states.data());
    decoder.logits(states.data(), rows, logits.data());
    keep(logits, out, "prefill");
    std::vector<std::int32_t> best(3);
    decoder.decode(cache, step.data(), rows, logits.data(), best.data());
    keep(logits, out, "step");
    decoder.decode(cache, guesses.data(), 3, guessed.data(), best.data(), best_logits.data());
    keep(guessed, out, "guesses");
    for (std::size_t place = 0; place < 3; ++place) {
        if (guessed[place * static_cast<std::size_t>(shape.vocabulary) + static_cast<std::size_t>(best[place])] !=
            best_logits[place]) {
            throw std::runtime_error("the best token's logit is not among the logits");
        }
    }
    KvCache copy(shape, 1, lengths[0] + 4);
    copy.copy_row(cache, 0, 0, lengths[0] + 1);
    std::vector<float> again(guessed.size());
    decoder.decode(copy, guesses.data(), 3, again.data(), nullptr);
    if (std::memcmp(again.data(), guessed.data(), guessed.size() * sizeof(float)) != 0) {
        throw std::runtime_error("a copied row gives other bits");
    }
}

void run_scene_model(const Case& recorded, const Outputs& out) {
    const Weights weights(recorded);
    SceneModel model(scene_shape(recorded.numbers), weights.table());
    const SceneShape& shape = model.shape();
    const std::vector<std::int64_t> bounds = recorded.integers("bounds"), sides = recorded.integers("grids");
    const std::int64_t tiles = static_cast<std::int64_t>(bounds.size()) - 1, patches = bounds.back(),
                       width = shape.vision.hidden;
    std::vector<std::array<std::int64_t, 2>> grids;
    for (std::size_t tile = 0; tile < sides.size(); tile += 2) {
        grids.push_back({sides[tile], sides[tile + 1]});
    }
    std::array<std::vector<float>, 3> taps, class_tokens, embeddings;
    std::array<float*, 3> tap_places{}, class_places{}, embedding_places{};
    std::array<const float*, 3> from{};
    const std::int64_t counts[] = {tiles * model.salient_count(bounds), tiles, 1};
    for (std::size_t level = 0; level < 3; ++level) {
        taps[level].resize(sized(patches, width));
        class_tokens[level].resize(sized(shape.vision.class_token ? tiles : 0, width));
        tap_places[level] = taps[level].data();
        class_places[level] = class_tokens[level].data();
        from[level] = taps[level].data();
        if (shape.embed > 0 && model.has_head(static_cast<int>(level))) {
            embeddings[level].resize(sized(counts[level], shape.embed));
            embedding_places[level] = embeddings[level].data();
        }
    }
    const std::vector<float> pixels = floats(recorded, "patches"), position_values = floats(recorded, "positions");
    std::vector<const float*> positions;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        positions.push_back(position_values.data() + bounds[static_cast<std::size_t>(tile)] * width);
    }
    model.encode({pixels.data(), positions, bounds, tap_places, class_places});
    model.align(from, class_places[2], bounds, embedding_places);
    std::array<std::vector<float>, 3> cues;
    std::array<Rows, 3> cue_rows{};
    for (std::size_t level = 0; level < 3; ++level) {
        const std::string name = std::to_string(level);
        keep(taps[level], out, "tap" + name);
        if (!class_tokens[level].empty()) {
            keep(class_tokens[level], out, "class" + name);
        }
        keep(embeddings[level], out, "embedding" + name);
        cues[level] = floats(recorded, "cues" + name);
        cue_rows[level] = {cues[level].data(), static_cast<std::int64_t>(cues[level].size()) / shape.embed};
    }
    const std::vector<float> query = floats(recorded, "query");
    std::vector<float> features(sized(patches, width));
    model.bridge(from, patches, cue_rows, {query.data(), static_cast<std::int64_t>(query.size()) / shape.language},
                 features.data());
    keep(features, out, "features");
    std::vector<float> tokens(sized(patches / (shape.pixel_shuffle * shape.pixel_shuffle), shape.language));
    model.project(features.data(), grids, tokens.data());
    keep(tokens, out, "tokens");
}

}  // namespace rsvlm::checks
