// Everything between a scene's patches and the language model: vision encoder, alignment heads, augmentation, experts,
// projector. Knows no text, no knowledge base, no pixels and no Python.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

#include "rsvlm/element.h"
#include "rsvlm/linear.h"
#include "rsvlm/scratch.h"
#include "rsvlm/varlen_tile_attention.h"
#include "rsvlm/weight_table.h"

namespace rsvlm {

enum class Activation { kGelu, kGeluTanh, kQuickGelu };

struct VisionShape {
    std::int64_t hidden, intermediate, heads, patch_values;  // 3 * p * p values of a patch
    std::array<std::int64_t, 3> taps;                        // ascending
    Activation activation;
    float eps;
    bool class_token;
};

// Parts with a width of 0 are absent.
struct SceneShape {
    VisionShape vision;
    std::int64_t embed = 0;            // of alignment
    std::int64_t text = 0;             // of the states that text_proj reads
    std::int64_t salient_patches = 0;  // of a tile
    bool class_pooling = false;
    std::int64_t augmentation_heads = 0, language = 0;
    std::int64_t experts = 0, expert_hidden = 0, top_k = 0;
    std::int64_t projector = 0, pixel_shuffle = 1;
    Activation projector_activation = Activation::kGelu;
};

// Rows of floats that a caller owns: [count, its part's width], contiguous.
struct Rows {
    const float* values;
    std::int64_t count;
};

// Calls exclude each other. A tile's and a scene's bits depend on no other one.
class SceneModel {
  public:
    // Throws std::invalid_argument for weights that do not fit the shape.
    SceneModel(const SceneShape& shape, const WeightTable& weights);

    const SceneShape& shape() const { return shape_; }

    // Tiles on their way in and out.
    struct Tiles {
        const float* patches;                        // [S, patch_values]
        const std::vector<const float*>& positions;  // of each tile [its patches, hidden]
        const std::vector<std::int64_t>& bounds;     // [T + 1]
        std::array<float*, 3> taps;                  // [S, hidden]
        std::array<float*, 3> class_tokens;          // [T, hidden], where the model has them
    };
    // Several tiles are shared out: each thread takes some hundred rows through all blocks, where its caches hold them.
    void encode(const Tiles& tiles);

    // Salient patches per tile of a scene with these bounds: its shortest tile may have fewer.
    std::int64_t salient_count(const std::vector<std::int64_t>& bounds) const;
    bool has_head(int level) const { return heads_[static_cast<std::size_t>(level)].proj.layout != nullptr; }
    // One scene's unit vectors: object [T, salient_count, embed], region [T, embed], scene [embed]; null where a head is
    // absent.
    void align(const std::array<const float*, 3>& taps, const float* scene_class_token, const std::vector<std::int64_t>& bounds,
               const std::array<float*, 3>& out);
    // States [count, text] -> unit vectors [count, embed].
    void embed_states(const float* states, std::int64_t count, float* out);

    // One scene's taps [S, hidden], cues per level [K, embed] and query tokens [Q, language] -> Y [S, hidden].
    void bridge(const std::array<const float*, 3>& taps, std::int64_t patches, const std::array<Rows, 3>& cues,
                const Rows& query, float* out);

    // Y [S, hidden] of tiles with these grids (rows, columns) -> visual tokens [S / pixel_shuffle^2, language].
    void project(const float* features, const std::vector<std::array<std::int64_t, 2>>& grids, float* out);

  private:
    struct Norm {
        const float *weight = nullptr, *bias = nullptr;
    };
    struct Block {
        Norm norm1, norm2;
        Linear qkv, o, fc1, fc2;
        const float *scale1, *scale2;
    };
    struct Head {
        Norm norm;
        Linear proj;
    };
    struct Level {
        Norm norm;
        Linear q, kv, o;
        std::vector<float> gate;  // tanh, repeated
    };
    struct Router {
        Norm norm;
        Linear router;
        float gate;
    };

    // What rows need on their way. All threads share the first one, or each takes tiles into its own.
    struct Workspace {
        int threads = 1;
        Buffer x, inputs, hidden, narrow, attended;
    };
    // Rows of the operand of a product, in the workspace until the next of the same kind.
    struct InputRows {
        const void* rows;
        std::int64_t count;
    };

    Norm norm(const WeightTable& weights, const std::string& name) const;
    Workspace& shared_workspace();
    // make(row, buffer of a row's floats) gives the floats.
    template <class Make>
    static InputRows write_rows(Workspace& work, const Linear& linear, std::int64_t count, const Make& make);
    static InputRows norm_rows(Workspace& work, const Linear& linear, const float* x, std::int64_t count, const Norm& norm,
                               float eps);
    static InputRows convert_rows(Workspace& work, const Linear& linear, const float* x, std::int64_t count);
    static void multiply(const Workspace& work, const Linear& linear, const InputRows& x, const ProductsTo& to);
    // The products' rows through the activation, for `next`.
    static InputRows activate(Workspace& work, const Linear& linear, const InputRows& x, Activation activation,
                              const Linear& next);
    // Products as attention takes them: `element_`.
    void multiply_narrow(const Workspace& work, const Linear& linear, const InputRows& x, void* out) const;
    // Heads side by side, for `next`. A row of each operand has its heads from `at` elements on.
    struct HeadsAt {
        const void* rows;
        std::int64_t row_stride, at;
    };
    InputRows attend(Workspace& work, const Linear& next, std::int64_t rows, std::int64_t heads,
                     const std::array<HeadsAt, 3>& qkv, const std::vector<std::int64_t>& bounds,
                     const std::vector<std::int64_t>& key_bounds) const;
    void encode_some(Workspace& work, const Tiles& tiles, const std::vector<std::int64_t>& chosen) const;
    void run_head(const Head& head, std::int64_t count, const float* x, float* out);
    void augment(const Level& level, const float* features, std::int64_t patches, const Rows& cues, const Rows& query,
                 float* out);
    void run_experts(const float* base, const std::array<const float*, 3>& features, std::int64_t patches, float* out);

    SceneShape shape_;
    Linear patch_embed_;
    Norm pre_norm_;
    const float *class_token_ = nullptr, *class_position_ = nullptr;
    std::vector<Block> blocks_;
    std::array<Head, 3> heads_;
    Linear text_proj_, cue_proj_, query_proj_;
    std::vector<Level> levels_;
    std::vector<Router> routers_;
    const void *w_gate_ = nullptr, *w_up_ = nullptr, *w_down_ = nullptr, *b_up_ = nullptr, *b_down_ = nullptr;
    Norm input_norm_;
    Linear fc1_, fc2_;

    std::mutex busy_;
    Element element_;  // of attention and experts
    std::vector<Workspace> workspaces_;
    Buffer context_, augmented_;
};

}  // namespace rsvlm
