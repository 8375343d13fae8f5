// Runs a compiled model on one input and prints the index of its largest output.
//
//     main INPUT.f32 [THREADS]
//
// The same as main.c, with an instance that frees itself and errors that are exceptions. The model
// has one float32 input and one float32 output.
#include "net.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

// Throws what the model says of a call that failed.
void check(shohin_status status) {
    if (status != SHOHIN_OK) {
        throw std::runtime_error(net_last_error());
    }
}

// The model on some threads. Not to be used by two threads at once; make one for each.
class Net {
public:
    explicit Net(int32_t threads) : instance_(create(threads), net_destroy) {}

    std::vector<float> operator()(const std::vector<float> &input) {
        std::vector<float> output(net_info()->outputs[0].bytes / sizeof(float));
        const void *inputs[] = {input.data()};
        void *outputs[] = {output.data()};
        const size_t input_bytes[] = {input.size() * sizeof(float)};
        const size_t output_bytes[] = {output.size() * sizeof(float)};
        check(net_run_sized(instance_.get(), inputs, input_bytes, outputs, output_bytes));
        return output;
    }

private:
    static shohin_instance *create(int32_t threads) {
        shohin_instance *made = nullptr;
        check(net_create(threads, &made));
        return made;
    }

    std::unique_ptr<shohin_instance, void (*)(shohin_instance *)> instance_;
};

std::vector<float> read(const char *path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error("cannot be opened");
    }
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    std::vector<float> values(bytes.size() / sizeof(float));
    std::copy_n(bytes.data(), values.size() * sizeof(float),
                reinterpret_cast<char *>(values.data()));
    return values;
}

} // namespace

int main(int count, char **arguments) {
    if (count < 2 || count > 3) {
        std::fputs("usage: main INPUT.f32 [THREADS]\n", stderr);
        return 1;
    }
    try {
        Net net(count > 2 ? std::atoi(arguments[2]) : 1);
        const std::vector<float> output = net(read(arguments[1]));
        const auto best = std::max_element(output.begin(), output.end());
        std::printf("%td %.9g\n", best - output.begin(), static_cast<double>(*best));
    } catch (const std::exception &error) {
        std::fprintf(stderr, "main: %s: %s\n", arguments[1], error.what());
        return 1;
    }
    return 0;
}
