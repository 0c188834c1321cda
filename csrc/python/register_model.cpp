#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>

#include "bindings.h"
#include "pointers.h"
#include "rsvlm/decoder.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Settings = std::map<std::string, double>;

double setting(const Settings& settings, const std::string& name) {
    const auto found = settings.find(name);
    if (found == settings.end()) {
        throw std::invalid_argument("settings must hold " + name + ", got none; export the package again");
    }
    return found->second;
}

LinearKind linear_kind(const std::string& kind) {
    if (kind == "fp32") {
        return LinearKind::kFloat32;
    }
    if (kind == "bf16") {
        return LinearKind::kBf16;
    }
    if (kind == "int8") {
        return LinearKind::kInt8;
    }
    if (kind == "int4") {
        return LinearKind::kInt4;
    }
    throw std::invalid_argument("kind must be 'fp32', 'bf16', 'int8' or 'int4', got '" + kind + "'; export the package again");
}

// name -> (kind, rows, columns, bytes) for a laid-out weight, ("", count, 0, bytes) for a float32 vector; the bytes stay the
// caller's.
WeightTable weight_table(const py::dict& weights) {
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
        } else {
            const Linear linear{linear_kind(kind), rows, columns, static_cast<const char*>(bytes.ptr), nullptr};
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
    PyDecoder(const py::dict& weights, const Settings& settings, const Array<float>& frequencies, const std::string& cache)
        : weights_(weights), decoder_(shape(settings, frequencies, cache), weight_table(weights)) {}

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

    py::array_t<std::int32_t> decode_best(KvCache& cache, const Array<std::int64_t>& rows, const Array<std::int64_t>& positions,
                                          const Array<std::int32_t>& token_ids) {
        const std::vector<DecodeRow> step = step_of(rows, positions, token_ids);
        py::array_t<std::int32_t> best(rows.size());
        std::int32_t* to = best.mutable_data();
        py::gil_scoped_release release;
        decoder_.decode(cache, step.data(), static_cast<std::int64_t>(step.size()), nullptr, to);
        return best;
    }

  private:
    static DecoderShape shape(const Settings& settings, const Array<float>& frequencies, const std::string& cache) {
        const auto whole = [&](const char* name) { return static_cast<std::int64_t>(setting(settings, name)); };
        return {whole("vocab_size"),
                whole("hidden_size"),
                whole("intermediate_size"),
                whole("num_layers"),
                whole("num_heads"),
                whole("num_kv_heads"),
                whole("head_dim"),
                static_cast<float>(setting(settings, "rms_norm_eps")),
                element(cache),
                std::vector<float>(frequencies.data(), frequencies.data() + frequencies.size())};
    }

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

}  // namespace

void register_model(py::module_& module) {
    py::class_<KvCache>(module, "KvCache", "Keys and values of some rows; made by NativeDecoder.cache, never grows.")
        .def_property_readonly("rows", &KvCache::rows)
        .def_property_readonly("capacity", &KvCache::capacity)
        .def("copy_row", &KvCache::copy_row, py::kw_only(), py::arg("source"), py::arg("source_row"), py::arg("row"),
             py::arg("length"), py::call_guard<py::gil_scoped_release>(), "The first `length` places of a row of another cache.");
    py::class_<PyDecoder>(module, "NativeDecoder", "The language model of a package, over weights that the caller has mapped.")
        .def(py::init<const py::dict&, const Settings&, const Array<float>&, const std::string&>(), py::kw_only(),
             py::arg("weights"), py::arg("settings"), py::arg("frequencies"), py::arg("cache"))
        .def("cache", &PyDecoder::cache, py::kw_only(), py::arg("rows"), py::arg("capacity"))
        .def("embed", &PyDecoder::embed, py::kw_only(), py::arg("token_ids"), "ids [n] -> float32 [n, hidden].")
        .def("prefill", &PyDecoder::prefill, py::kw_only(), py::arg("cache"), py::arg("rows"), py::arg("positions"),
             py::arg("lengths"), py::arg("embeddings"),
             "Embeddings of all rows one after another [sum of lengths, hidden] -> last states [rows, hidden].")
        .def("logits", &PyDecoder::logits, py::kw_only(), py::arg("states"), "[n, hidden] -> [n, vocabulary].")
        .def("decode", &PyDecoder::decode, py::kw_only(), py::arg("cache"), py::arg("rows"), py::arg("positions"),
             py::arg("token_ids"), "One step of tokens [n] -> logits [n, vocabulary].")
        .def("decode_best", &PyDecoder::decode_best, py::kw_only(), py::arg("cache"), py::arg("rows"), py::arg("positions"),
             py::arg("token_ids"), "The same -> the most likely ids [n], ties to the lowest.");
}

}  // namespace rsvlm::python
