// Writes rows of what a call makes.
#pragma once

#include "step.h"

namespace fastserve {

// Writes rows of a call's result, whole or by parts, as its matrix has them: floats where they lie; quantized, by way
// of scratch memory.
class RowWriter {
 public:
  explicit RowWriter(const Matrix& out) : out_(out), layout_(out) {}

  int64_t scratch_floats() const { return out_.is_quantized() ? out_.width : 0; }
  // Where to put the row's floats from `column` on; `finish` must follow.
  float* begin(const Step& step, int32_t row, int32_t column, float* scratch) const {
    return out_.is_quantized() ? scratch : step.row(out_, row) + column;
  }
  // `column` and, short of the row's end, `width` are multiples of the group size.
  void finish(const Step& step, int32_t row, int32_t column, int32_t width, const float* written) const {
    if (!out_.is_quantized()) return;
    auto* data = reinterpret_cast<int8_t*>(step.row(out_, row));
    const int32_t padded_width = column + width < out_.width ? width : layout_.padded_depth - column;
    const int32_t group = column / layout_.group_size;
    step.kernels.quantize_row(written, width, padded_width, layout_.group_size, data + column,
                              reinterpret_cast<float*>(data + layout_.scales_offset) + group,
                              reinterpret_cast<int32_t*>(data + layout_.corrections_offset) + group);
  }

 private:
  Matrix out_;
  QuantizedLayout layout_;
};

}  // namespace fastserve
