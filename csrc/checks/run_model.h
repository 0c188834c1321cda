// Recorded cases of the model in C++: one product, the language model, the scene model. Knows no op.
#pragma once

#include "case_file.h"

namespace rsvlm::checks {

// Arrays "weight/KIND/ROWS/COLUMNS/NAME" are the model's weights, KIND as in a package or "vector"; the word int8_inputs lists
// beginnings of names, with commas between them.
void run_linear(const Case& recorded, const Outputs& out);
void run_decoder(const Case& recorded, const Outputs& out);
void run_scene_model(const Case& recorded, const Outputs& out);

}  // namespace rsvlm::checks
