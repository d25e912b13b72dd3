// Classify a picture of the network's size, model of: potstill export RUN --format openvino --preprocessing normalise
// Build with OpenVINO's headers and library, which its pip package has (folders include and libs):
//   g++ -std=c++17 classify.cpp -I OPENVINO/include OPENVINO/libs/libopenvino.so.* -o classify
//   ./classify model.xml picture.ppm
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <regex>
#include <openvino/openvino.hpp>

int main(int count, char** words) {
    if (count != 3) return std::cerr << "usage: classify model.xml picture.ppm\n", 2;
    auto model = ov::Core().read_model(words[1]);
    // The metadata is JSON; of it, the class names are needed here, one for each output of the network.
    auto text = model->get_rt_info<std::string>("potstill");
    text = text.substr(text.find("\"class_names\": [") + 15);
    const auto classes = size_t(model->output().get_partial_shape()[1].get_length());
    std::vector<std::string> names;
    const std::regex quoted("\"((?:[^\"\\\\]|\\\\.)*)\"");
    for (std::sregex_iterator at(text.begin(), text.end(), quoted), end; at != end && names.size() < classes; ++at)
        names.push_back((*at)[1]);

    // A PPM image, "P6 WIDTH HEIGHT 255", then RGB bytes.  Any decoder will do that gives such bytes.
    std::ifstream file(words[2], std::ios::binary);
    std::string magic;
    size_t width = 0, height = 0, most = 0;
    file >> magic >> width >> height >> most;
    file.get();
    const auto size = model->input().get_partial_shape()[3].get_length();
    if (width != size_t(size) || height != width)
        return std::cerr << "the picture must have " << size << " x " << size << " pixels\n", 3;
    ov::Tensor image(ov::element::u8, {1, height, width, 3});
    if (magic != "P6" || most != 255 || !file.read(static_cast<char*>(image.data()), image.get_byte_size()))
        return std::cerr << words[2] << " is no binary PPM image of 8 bits\n", 3;

    ov::preprocess::PrePostProcessor order_of_bytes(model);  // from rows of RGB to planes
    order_of_bytes.input().tensor().set_layout("NHWC");
    order_of_bytes.input().model().set_layout("NCHW");
    model = order_of_bytes.build();
    // Without this, processors with bfloat16 compute in it: faster, and the last digits differ.
    const auto precise = ov::hint::inference_precision(ov::element::f32);
    auto request = ov::Core().compile_model(model, "CPU", precise).create_infer_request();
    request.set_input_tensor(image);
    request.infer();
    const float* logits = request.get_output_tensor().data<const float>();
    const float largest = *std::max_element(logits, logits + names.size());
    std::vector<double> shares;
    for (size_t i = 0; i < names.size(); ++i) shares.push_back(std::exp(logits[i] - largest));
    const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
    std::vector<size_t> order(names.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return shares[a] > shares[b]; });
    for (size_t i = 0; i < std::min<size_t>(3, order.size()); ++i)
        std::cout << names[order[i]] << " " << shares[order[i]] / sum << "\n";
}
