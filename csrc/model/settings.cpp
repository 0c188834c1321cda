#include "rsvlm/settings.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace rsvlm {
namespace {

double setting(const Settings& settings, const std::string& name) {
    const auto found = settings.find(name);
    if (found == settings.end()) {
        throw std::invalid_argument("settings must hold " + name + ", got none; export the package again");
    }
    return found->second;
}

Activation activation(double code) {
    return code == 0 ? Activation::kGelu : code == 1 ? Activation::kGeluTanh : Activation::kQuickGelu;
}

}  // namespace

DecoderShape decoder_shape(const Settings& settings, std::vector<float> frequencies, Element cache) {
    const auto whole = [&](const char* name) { return static_cast<std::int64_t>(setting(settings, name)); };
    return {whole("vocab_size"),
            whole("hidden_size"),
            whole("intermediate_size"),
            whole("num_layers"),
            whole("num_heads"),
            whole("num_kv_heads"),
            whole("head_dim"),
            static_cast<float>(setting(settings, "rms_norm_eps")),
            cache,
            std::move(frequencies)};
}

SceneShape scene_shape(const Settings& settings) {
    const auto whole = [&](const char* name) { return static_cast<std::int64_t>(setting(settings, name)); };
    SceneShape shape;
    shape.vision = {whole("vision_hidden"),
                    whole("vision_intermediate"),
                    whole("vision_heads"),
                    whole("patch_values"),
                    {whole("tap_object"), whole("tap_region"), whole("tap_scene")},
                    activation(setting(settings, "vision_activation")),
                    static_cast<float>(setting(settings, "vision_eps")),
                    whole("class_token") != 0};
    shape.embed = whole("embed");
    shape.text = whole("text");
    shape.salient_patches = whole("salient_patches");
    shape.class_pooling = whole("class_pooling") != 0;
    shape.augmentation_heads = whole("augmentation_heads");
    shape.language = whole("language");
    shape.experts = whole("experts");
    shape.expert_hidden = whole("expert_hidden");
    shape.top_k = whole("top_k");
    shape.projector = whole("projector");
    shape.pixel_shuffle = whole("pixel_shuffle");
    shape.projector_activation = activation(setting(settings, "projector_activation"));
    return shape;
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

bool rounds_inputs(LinearKind kind, const std::string& name, const std::vector<std::string>& int8_inputs) {
    return (kind == LinearKind::kInt8 || kind == LinearKind::kInt4) &&
           std::any_of(int8_inputs.begin(), int8_inputs.end(),
                       [&](const std::string& part) { return name.rfind(part, 0) == 0; });
}

}  // namespace rsvlm
