#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "bindings.h"
#include "pointers.h"
#include "reused_arrays.h"
#include "rsvlm/decoder.h"
#include "rsvlm/scene_model.h"
#include "rsvlm/settings.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
// name -> (kind, rows, columns, bytes) for a laid-out weight, ("", count, 0, bytes) for a float32 vector and ("raw", count, 0,
// bytes) for values of two bytes; the bytes stay the caller's. Int8 and int4 weights whose name begins with one of
// `int8_inputs` round their inputs to int8.
WeightTable weight_table(const py::dict& weights, const std::vector<std::string>& int8_inputs) {
    WeightTable table;
    for (const auto& item : weights) {
        const auto name = item.first.cast<std::string>();
        const auto value = item.second.cast<py::tuple>();
        const auto kind = value[0].cast<std::string>();
        const auto rows = value[1].cast<std::int64_t>(), columns = value[2].cast<std::int64_t>();
        const auto bytes = value[3].cast<py::buffer>().request();
        const auto size = static_cast<std::int64_t>(bytes.size * bytes.itemsize);
        std::int64_t expected = rows * 4;
        if (kind.empty()) {
            table.add_vector(name, static_cast<const float*>(bytes.ptr), rows);
        } else if (kind == "raw") {
            expected = rows * 2;
            table.add_raw(name, bytes.ptr, rows);
        } else {
            Linear linear{linear_kind(kind), rows, columns, static_cast<const char*>(bytes.ptr)};
            linear.int8_inputs = rounds_inputs(linear.kind, name, int8_inputs);
            expected = linear_layout_bytes(linear);
            table.add_linear(name, linear);
        }
        if (size != expected) {
            throw std::invalid_argument("weight " + name + " must have " + std::to_string(expected) + " bytes, got " +
                                        std::to_string(size) + "; export the package again");
        }
    }
    return table;
}

class PyDecoder {
  public:
    PyDecoder(const py::dict& weights, const Settings& settings, const Array<float>& frequencies, const std::string& cache,
              const std::vector<std::string>& int8_inputs)
        : weights_(weights),
          decoder_(decoder_shape(settings, {frequencies.data(), frequencies.data() + frequencies.size()}, element(cache)),
                   weight_table(weights, int8_inputs)) {}

    std::unique_ptr<KvCache> cache(std::int64_t rows, std::int64_t capacity) const {
        return std::make_unique<KvCache>(decoder_.shape(), rows, capacity);
    }

    py::array_t<float> embed(const Array<std::int32_t>& token_ids) const {
        py::array_t<float> out({token_ids.size(), decoder_.shape().hidden});
        decoder_.embed(token_ids.data(), token_ids.size(), out.mutable_data());
        return out;
    }

    py::array_t<float> prefill(KvCache& cache, const Array<std::int64_t>& rows, const Array<std::int64_t>& positions,
                               const Array<std::int64_t>& lengths, const Array<float>& embeddings) {
        std::vector<PrefillRow> prompts;
        std::int64_t tokens = 0;
        check_lengths(rows.size(), positions.size(), lengths.size());
        for (py::ssize_t i = 0; i < rows.size(); ++i) {
            prompts.push_back({rows.data()[i], positions.data()[i], lengths.data()[i]});
            tokens += lengths.data()[i];
        }
        const std::int64_t hidden = decoder_.shape().hidden;
        if (embeddings.size() != tokens * hidden) {
            throw std::invalid_argument("embeddings must be [" + std::to_string(tokens) + ", " + std::to_string(hidden) +
                                        "], got " + std::to_string(embeddings.size()) + " values; give every token one row");
        }
        py::array_t<float> states({rows.size(), static_cast<py::ssize_t>(hidden)});
        float* to = states.mutable_data();
        const float* from = embeddings.data();
        py::gil_scoped_release release;
        decoder_.prefill(cache, prompts.data(), static_cast<std::int64_t>(prompts.size()), from, to);
        return states;
    }

    py::array_t<float> logits(const Array<float>& states) {
        const std::int64_t count = states.size() / decoder_.shape().hidden;
        py::array_t<float> out({count, decoder_.shape().vocabulary});
        float* to = out.mutable_data();
        const float* from = states.data();
        py::gil_scoped_release release;
        decoder_.logits(from, count, to);
        return out;
    }

    py::array_t<float> decode(KvCache& cache, const Array<std::int64_t>& rows, const Array<std::int64_t>& positions,
                              const Array<std::int32_t>& token_ids) {
        const std::vector<DecodeRow> step = step_of(rows, positions, token_ids);
        py::array_t<float> out({rows.size(), static_cast<py::ssize_t>(decoder_.shape().vocabulary)});
        float* to = out.mutable_data();
        py::gil_scoped_release release;
        decoder_.decode(cache, step.data(), static_cast<std::int64_t>(step.size()), to, nullptr);
        return out;
    }

    py::tuple decode_best(KvCache& cache, const Array<std::int64_t>& rows, const Array<std::int64_t>& positions,
                          const Array<std::int32_t>& token_ids) {
        const std::vector<DecodeRow> step = step_of(rows, positions, token_ids);
        py::array_t<std::int32_t> best(rows.size());
        py::array_t<float> logits(rows.size());
        std::int32_t* to = best.mutable_data();
        float* values = logits.mutable_data();
        {
            py::gil_scoped_release release;
            decoder_.decode(cache, step.data(), static_cast<std::int64_t>(step.size()), nullptr, to, values);
        }
        return py::make_tuple(best, logits);
    }

  private:
    static void check_lengths(py::ssize_t rows, py::ssize_t positions, py::ssize_t others) {
        if (rows != positions || rows != others) {
            throw std::invalid_argument("rows, positions and tokens must have one length, got " + std::to_string(rows) + ", " +
                                        std::to_string(positions) + " and " + std::to_string(others) + "; give each row one");
        }
    }

    static std::vector<DecodeRow> step_of(const Array<std::int64_t>& rows, const Array<std::int64_t>& positions,
                                          const Array<std::int32_t>& token_ids) {
        check_lengths(rows.size(), positions.size(), token_ids.size());
        std::vector<DecodeRow> step;
        for (py::ssize_t i = 0; i < rows.size(); ++i) {
            step.push_back({rows.data()[i], positions.data()[i], token_ids.data()[i]});
        }
        return step;
    }

    py::dict weights_;  // keeps the memory
    Decoder decoder_;
};

class PySceneModel {
  public:
    PySceneModel(const py::dict& weights, const Settings& settings, const std::vector<std::string>& int8_inputs)
        : weights_(weights), model_(scene_shape(settings), weight_table(weights, int8_inputs)) {}

    // Three taps [S, hidden], then three class tokens [T or 0, hidden].
    std::vector<py::array_t<float>> encode(const Array<float>& patches, const std::vector<Array<float>>& positions,
                                           const std::vector<std::int64_t>& bounds) {
        const VisionShape& vision = model_.shape().vision;
        const std::int64_t count = check_bounds(bounds);
        check_size("patches", patches.size(), count * vision.patch_values);
        check_size("positions", static_cast<std::int64_t>(positions.size()), static_cast<std::int64_t>(bounds.size()) - 1);
        std::vector<const float*> places;
        for (std::size_t tile = 0; tile < positions.size(); ++tile) {
            check_size("positions", positions[tile].size(), (bounds[tile + 1] - bounds[tile]) * vision.hidden);
            places.push_back(positions[tile].data());
        }
        const std::int64_t tiles = vision.class_token ? static_cast<std::int64_t>(bounds.size()) - 1 : 0;
        std::vector<py::array_t<float>> out;
        std::array<float*, 3> taps{}, class_tokens{};
        for (std::size_t i = 0; i < 6; ++i) {
            out.emplace_back(ReusedArrays::make({i < 3 ? count : tiles, vision.hidden}));
            (i < 3 ? taps[i] : class_tokens[i - 3]) = out[i].mutable_data();
        }
        const float* from = patches.data();
        py::gil_scoped_release release;
        model_.encode({from, places, bounds, taps, class_tokens});
        return out;
    }

    py::array_t<float> copy_patches(const Array<float>& patches) const {
        py::array_t<float> copy = ReusedArrays::make({patches.shape(), patches.shape() + patches.ndim()});
        std::memcpy(copy.mutable_data(), patches.data(), static_cast<std::size_t>(patches.nbytes()));
        return copy;
    }

    std::vector<py::array_t<float>> align(const std::array<Array<float>, 3>& taps, const Array<float>& scene_class_token,
                                          const std::vector<std::int64_t>& bounds) {
        const VisionShape& vision = model_.shape().vision;
        const std::int64_t count = check_bounds(bounds), tiles = static_cast<std::int64_t>(bounds.size()) - 1;
        const std::int64_t embed = model_.shape().embed;
        std::array<const float*, 3> from{};
        std::array<float*, 3> to{};
        std::vector<py::array_t<float>> out;
        const std::vector<py::ssize_t> shapes[] = {{tiles, model_.salient_count(bounds), embed}, {tiles, embed}, {embed}};
        for (std::size_t level = 0; level < 3; ++level) {
            check_size("taps", taps[level].size(), count * vision.hidden);
            from[level] = taps[level].data();
            const bool present = model_.has_head(static_cast<int>(level));
            out.emplace_back(present ? shapes[level] : std::vector<py::ssize_t>{0});
            to[level] = present ? out[level].mutable_data() : nullptr;
        }
        if (model_.shape().class_pooling) {
            check_size("scene_class_token", scene_class_token.size(), vision.hidden);
        }
        const float* token = scene_class_token.data();
        py::gil_scoped_release release;
        model_.align(from, token, bounds, to);
        return out;
    }

    py::array_t<float> embed_states(const Array<float>& states) {
        const std::int64_t count = states.size() / model_.shape().text;
        py::array_t<float> out({count, model_.shape().embed});
        float* to = out.mutable_data();
        const float* from = states.data();
        py::gil_scoped_release release;
        model_.embed_states(from, count, to);
        return out;
    }

    py::array_t<float> bridge(const std::array<Array<float>, 3>& taps, const std::array<Array<float>, 3>& cues,
                              const Array<float>& query) {
        const SceneShape& shape = model_.shape();
        const std::int64_t width = shape.vision.hidden, patches = taps[0].size() / width;
        std::array<const float*, 3> from{};
        std::array<Rows, 3> cue_rows{};
        for (std::size_t level = 0; level < 3; ++level) {
            check_size("taps", taps[level].size(), patches * width);
            from[level] = taps[level].data();
            cue_rows[level] = {cues[level].data(), shape.embed > 0 ? cues[level].size() / shape.embed : 0};
        }
        const Rows query_rows{query.data(), shape.language > 0 ? query.size() / shape.language : 0};
        py::array_t<float> out({patches, width});
        float* to = out.mutable_data();
        py::gil_scoped_release release;
        model_.bridge(from, patches, cue_rows, query_rows, to);
        return out;
    }

    py::array_t<float> project(const Array<float>& features, const std::vector<std::array<std::int64_t, 2>>& grids) {
        const SceneShape& shape = model_.shape();
        std::int64_t count = 0;
        for (const auto& grid : grids) {
            count += grid[0] * grid[1];
            if (grid[0] < 1 || grid[1] < 1 || grid[0] % shape.pixel_shuffle != 0 || grid[1] % shape.pixel_shuffle != 0) {
                throw std::invalid_argument("grids must be multiples of pixel_shuffle " + std::to_string(shape.pixel_shuffle) +
                                            ", got " + std::to_string(grid[0]) + " by " + std::to_string(grid[1]) +
                                            "; plan the scene with this package's config");
            }
        }
        check_size("features", features.size(), count * shape.vision.hidden);
        py::array_t<float> out({count / (shape.pixel_shuffle * shape.pixel_shuffle), shape.language});
        float* to = out.mutable_data();
        const float* from = features.data();
        py::gil_scoped_release release;
        model_.project(from, grids, to);
        return out;
    }

  private:
    static void check_size(const char* name, std::int64_t found, std::int64_t expected) {
        if (found != expected) {
            throw std::invalid_argument(std::string(name) + " must hold " + std::to_string(expected) + " values, got " +
                                        std::to_string(found) + "; check the scene's bounds");
        }
    }

    static std::int64_t check_bounds(const std::vector<std::int64_t>& bounds) {
        if (bounds.size() < 2 || bounds.front() != 0 || !std::is_sorted(bounds.begin(), bounds.end())) {
            throw std::invalid_argument("bounds must rise from 0 over at least one tile, got " + std::to_string(bounds.size()) +
                                        " of them; pass the tiles' lengths summed");
        }
        return bounds.back();
    }

    py::dict weights_;  // keeps the memory
    SceneModel model_;
};

}  // namespace

void register_model(py::module_& module) {
    py::class_<KvCache>(module, "KvCache", "Keys and values of some rows; made by NativeDecoder.cache, never grows.")
        .def_property_readonly("rows", &KvCache::rows)
        .def_property_readonly("capacity", &KvCache::capacity)
        .def("copy_row", &KvCache::copy_row, py::kw_only(), py::arg("source"), py::arg("source_row"), py::arg("row"),
             py::arg("length"), py::call_guard<py::gil_scoped_release>(),
             "The first `length` places of a row of another cache.");
    py::class_<PyDecoder>(module, "NativeDecoder", "The language model of a package, over weights that the caller has mapped.")
        .def(py::init<const py::dict&, const Settings&, const Array<float>&, const std::string&,
                      const std::vector<std::string>&>(),
             py::kw_only(), py::arg("weights"), py::arg("settings"), py::arg("frequencies"), py::arg("cache"),
             py::arg("int8_inputs") = std::vector<std::string>())
        .def("cache", &PyDecoder::cache, py::kw_only(), py::arg("rows"), py::arg("capacity"))
        .def("embed", &PyDecoder::embed, py::kw_only(), py::arg("token_ids"), "ids [n] -> float32 [n, hidden].")
        .def("prefill", &PyDecoder::prefill, py::kw_only(), py::arg("cache"), py::arg("rows"), py::arg("positions"),
             py::arg("lengths"), py::arg("embeddings"),
             "Embeddings of all rows one after another [sum of lengths, hidden] -> last states [rows, hidden].")
        .def("logits", &PyDecoder::logits, py::kw_only(), py::arg("states"), "[n, hidden] -> [n, vocabulary].")
        .def("decode", &PyDecoder::decode, py::kw_only(), py::arg("cache"), py::arg("rows"), py::arg("positions"),
             py::arg("token_ids"), "One step of tokens [n] -> logits [n, vocabulary].")
        .def("decode_best", &PyDecoder::decode_best, py::kw_only(), py::arg("cache"), py::arg("rows"), py::arg("positions"),
             py::arg("token_ids"), "The same -> the most likely ids [n], ties to the lowest, and their logits [n].");
    py::class_<PySceneModel>(module, "NativeSceneModel", "Everything between patches and the language model.")
        .def(py::init<const py::dict&, const Settings&, const std::vector<std::string>&>(), py::kw_only(), py::arg("weights"),
             py::arg("settings"), py::arg("int8_inputs") = std::vector<std::string>())
        .def("encode", &PySceneModel::encode, py::kw_only(), py::arg("patches"), py::arg("positions"), py::arg("bounds"),
             "patches [S, 3 p p] and each tile's positions [N, Dv] -> three taps [S, Dv], three class tokens [T or 0, Dv].")
        .def("copy_patches", &PySceneModel::copy_patches, py::kw_only(), py::arg("patches"),
             "A copy, in memory that dropped arrays have left.")
        .def("align", &PySceneModel::align, py::kw_only(), py::arg("taps"), py::arg("scene_class_token"), py::arg("bounds"),
             "One scene's object [T, k, De], region [T, De] and scene [De]; empty where the model has no head.")
        .def("embed_states", &PySceneModel::embed_states, py::kw_only(), py::arg("states"), "[n, Dl] -> unit vectors [n, De].")
        .def("bridge", &PySceneModel::bridge, py::kw_only(), py::arg("taps"), py::arg("cues"), py::arg("query"),
             "One scene's taps, cues [K, De] of each level and query tokens [Q, Dl] -> Y [S, Dv].")
        .def("project", &PySceneModel::project, py::kw_only(), py::arg("features"), py::arg("grids"),
             "Y [S, Dv] -> visual tokens [Nv, Dl].");
}

}  // namespace rsvlm::python
