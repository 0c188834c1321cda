// A model's shapes from the numbers of its config, by name. Knows no file and no Python.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "rsvlm/decoder.h"
#include "rsvlm/linear.h"
#include "rsvlm/scene_model.h"

namespace rsvlm {

using Settings = std::map<std::string, double>;

// All throw std::invalid_argument for a name that is absent or a word that is unknown.
DecoderShape decoder_shape(const Settings& settings, std::vector<float> frequencies, Element cache);
SceneShape scene_shape(const Settings& settings);
// "fp32", "bf16", "int8" or "int4".
LinearKind linear_kind(const std::string& kind);
// Whether a weight's name begins with one of these; of int8 and int4 weights only.
bool rounds_inputs(LinearKind kind, const std::string& name, const std::vector<std::string>& int8_inputs);

}  // namespace rsvlm
