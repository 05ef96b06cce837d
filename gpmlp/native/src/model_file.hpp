// A model's file for engines: the record of the calls that build the model, replayed.
//
// A line of text padded to whole words ("gpmlp-export 1 abi 1 ..."), one record for each call (gpmlp/io/export.py writes
// them), and a last word with the CRC-32 of all before. A word is a little-endian int64. A record is the name of the function
// and its number of arguments; an argument is its letter, as in gpmlp/native/library.py: SIGNATURES, and a number, or the count
// and the bytes of an array, padded to whole words. Objects are referred to by the number of the record that made them.
#pragma once

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "abi.hpp"
#include "expansion.hpp"
#include "force_variance.hpp"
#include "model.hpp"

namespace gpmlp {

constexpr int EXPORT_FORMAT = 1;
constexpr int64_t WORD = sizeof(int64_t), NOTHING = -1; // a reference to no object
using Words = std::vector<int64_t>;

inline uint32_t crc32(const unsigned char *bytes, std::size_t n) {
    static const auto table = [] {
        std::array<uint32_t, 256> out{};
        for (uint32_t k = 0; k < 256; k++) {
            out[k] = k;
            for (int bit = 0; bit < 8; bit++) out[k] = out[k] & 1 ? 0xEDB88320u ^ (out[k] >> 1) : out[k] >> 1;
        }
        return out;
    }();
    uint32_t crc = ~0u;
    for (std::size_t k = 0; k < n; k++) crc = table[(crc ^ bytes[k]) & 255] ^ (crc >> 8);
    return ~crc;
}

[[noreturn]] inline void refuse(const std::string &sentence) { throw std::runtime_error(sentence); }
inline const char *damaged() { return "is damaged (not all of its bytes are those that were written); export the model again"; }

// Of the records in a file, one argument after the other.
class RecordReader {
    const int64_t *at, *end;
    const std::vector<int64_t> &objects; // by record; 0 where one made none
    std::vector<std::unique_ptr<Words>> addresses;

  public:
    RecordReader(const int64_t *begin, const int64_t *end, const std::vector<int64_t> &objects) : at(begin), end(end), objects(objects) {}

    bool done() const { return at == end; }

    int64_t word() { return *take_words(1); }

    // What lies in the next n bytes, and the padding behind them.
    const char *bytes(int64_t count, int64_t each) {
        if (count < 0 || count > (end - at) * WORD / each) refuse(damaged());
        return reinterpret_cast<const char *>(take_words((count * each + WORD - 1) / WORD));
    }

    template <class T> T take() {
        const int64_t letter = word();
        if constexpr (std::is_pointer_v<T>) {
            return array<std::remove_const_t<std::remove_pointer_t<T>>>(letter);
        } else if constexpr (std::is_same_v<T, double>) {
            expect(letter == 'x');
            double value;
            std::memcpy(&value, take_words(1), sizeof value);
            return value;
        } else {
            expect(letter == 'n' || letter == 'o');
            return letter == 'n' ? word() : object(word());
        }
    }

  private:
    static void expect(bool fits) {
        if (!fits) refuse("holds other arguments than this version of gpmlp reads; export the model again with it");
    }

    const int64_t *take_words(int64_t n) {
        if (n > end - at) refuse(damaged());
        at += n;
        return at - n;
    }

    int64_t object(int64_t record) const {
        if (record < NOTHING || record >= int64_t(objects.size())) refuse(damaged());
        return record == NOTHING ? 0 : objects[record];
    }

    template <class T> const T *array(int64_t letter) {
        if (letter == 'n') { // an array that is left out
            expect(word() == 0);
            return nullptr;
        }
        if constexpr (std::is_same_v<T, int64_t>) {
            if (letter == 'O') {
                const int64_t n = word(), *records = reinterpret_cast<const int64_t *>(bytes(n, WORD));
                addresses.push_back(std::make_unique<Words>());
                for (int64_t k = 0; k < n; k++) addresses.back()->push_back(object(records[k]));
                return addresses.back()->data();
            }
            expect(letter == 'I');
        } else {
            expect(letter == (std::is_same_v<T, double> ? 'D' : std::is_same_v<T, float> ? 'F' : 'S'));
        }
        const int64_t n = word();
        return reinterpret_cast<const T *>(bytes(n, sizeof(T)));
    }
};

using Replay = std::function<int64_t(RecordReader &, int64_t)>;

// A call of `function` with the arguments that follow in the file.
template <class... A> Replay replay(int64_t (*function)(A...)) {
    return [function](RecordReader &reader, int64_t n) {
        if (n != int64_t(sizeof...(A))) refuse("was written by another version of gpmlp; export the model again with this one");
        const std::tuple<A...> arguments{reader.take<A>()...}; // in this order, as braces demand
        return std::apply(function, arguments);
    };
}

inline const std::map<std::string, Replay> &replayed_functions() {
#define GPMLP_REPLAY(NAME)                                                                                                                 \
    {                                                                                                                                      \
        #NAME, replay(gpmlp_##NAME)                                                                                                        \
    }
    static const std::map<std::string, Replay> functions{
        GPMLP_REPLAY(spectrum_f64),     GPMLP_REPLAY(spectrum_f32),  GPMLP_REPLAY(compress_f64), GPMLP_REPLAY(compress_f32), GPMLP_REPLAY(add_four_body_f64), GPMLP_REPLAY(add_four_body_f32), GPMLP_REPLAY(quadratic_form_f64), GPMLP_REPLAY(quadratic_form_f32), GPMLP_REPLAY(low_rank_form_f64), GPMLP_REPLAY(low_rank_form_f32),
        GPMLP_REPLAY(inducing_centres), GPMLP_REPLAY(model),         GPMLP_REPLAY(add_term),       GPMLP_REPLAY(inducing_columns),
        GPMLP_REPLAY(projected_mean), GPMLP_REPLAY(widened_mean), GPMLP_REPLAY(local_variance),   GPMLP_REPLAY(clusters),      GPMLP_REPLAY(add_variances),  GPMLP_REPLAY(add_novelty),
        GPMLP_REPLAY(calibrate),        GPMLP_REPLAY(add_posterior), GPMLP_REPLAY(add_tail),
    };
#undef GPMLP_REPLAY
    return functions;
}

// The whole of a file; throws a sentence that begins with what the file does.
inline Words read_words(const std::string &path) {
    const std::unique_ptr<FILE, int (*)(FILE *)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
    std::vector<char> text;
    char buffer[1 << 16];
    std::size_t n = 0;
    if (file)
        while ((n = std::fread(buffer, 1, sizeof buffer, file.get())) > 0) text.insert(text.end(), buffer, buffer + n);
    if (!file || std::ferror(file.get())) refuse(std::string("cannot be read: ") + std::strerror(errno));
    Words out((text.size() + WORD - 1) / WORD, 0);
    std::memcpy(out.data(), text.data(), text.size());
    if (text.size() % WORD) out.push_back(0); // no checksum of anything
    return out;
}

// Where records begin: behind the first line, which says that this is an export, whole, and of this version.
inline const int64_t *check_head(const Words &words) {
    static const std::string magic = "gpmlp-export ";
    const char *text = reinterpret_cast<const char *>(words.data());
    const std::size_t size = words.size() * WORD;
    if (size < magic.size() || magic.compare(0, std::string::npos, text, magic.size()))
        refuse("is no model for engines; write one by: gpmlp export MODEL.gpmlp --to lammps -o FILE (or --to kim)");
    const auto *line_end = static_cast<const char *>(std::memchr(text, '\n', size));
    if (!line_end || (line_end + 1 - text) % WORD ||
        words.back() != int64_t(crc32(reinterpret_cast<const unsigned char *>(text), size - WORD)))
        refuse(damaged());
    int format = 0, abi = 0;
    const std::string line(text, line_end);
    std::sscanf(line.c_str() + magic.size(), "%d abi %d", &format, &abi);
    if (format != EXPORT_FORMAT || abi != ABI)
        refuse("was written by another version of gpmlp (" + line.substr(magic.size(), line.find_last_not_of(' ') + 1 - magic.size()) +
               ") than this program was built with (abi " + std::to_string(ABI) +
               "); export the model again and build this program again with one version of gpmlp");
    return words.data() + (line_end + 1 - text) / WORD;
}

// What the first line of a file, checked before, says of `key`: gpmlp, units, species (symbols, by commas), cutoff, sha256.
inline std::string head_entry(const Words &words, const std::string &key) {
    const char *text = reinterpret_cast<const char *>(words.data());
    std::istringstream line(std::string(text, std::strchr(text, '\n')));
    for (std::string word; line >> word;)
        if (word == key && line >> word) return word;
    return "";
}

// The model whose building the words of a file record; it owns whatever it is made of. Throws a sentence that begins with
// what the file does.
inline std::unique_ptr<Model> model_of(const Words &words) {
    const int64_t *begin = check_head(words);
    std::vector<int64_t> made; // by record
    std::vector<std::unique_ptr<Object>> objects;
    std::unique_ptr<Model> model;
    RecordReader reader(begin, words.data() + words.size() - 1, made);
    while (!reader.done()) {
        const int64_t length = reader.word();
        const char *letters = reader.bytes(length, 1);
        const std::string name(letters, length);
        const auto found = replayed_functions().find(name);
        if (found == replayed_functions().end())
            refuse("needs " + name + ", which this version of gpmlp has not; export the model again with it");
        const int64_t address = found->second(reader, reader.word());
        if (address < 0) throw std::bad_alloc();
        made.push_back(address);
        if (name == "model")
            model.reset(static_cast<Model *>(reinterpret_cast<Object *>(address)));
        else if (address)
            objects.emplace_back(reinterpret_cast<Object *>(address));
    }
    if (!model) refuse("holds no model; export it again");
    model->made_of = std::move(objects);
    return model;
}

} // namespace gpmlp

// The model of a file, by its address, to be freed by gpmlp_free; 0 and a sentence in `error` (of size bytes) if there is none.
GPMLP_API int64_t gpmlp_load_model(const char *path, char *error, int64_t size) {
    const auto say = [&](const std::string &sentence) {
        std::snprintf(error, std::size_t(size), "%s: %s.", path, sentence.c_str());
        return 0;
    };
    try {
        return gpmlp::address_of(gpmlp::model_of(gpmlp::read_words(path)).release());
    } catch (const std::bad_alloc &) {
        return say("there is not enough memory for it");
    } catch (const std::exception &problem) {
        return say(problem.what());
    }
}

// Largest cutoff, A.
GPMLP_API int64_t gpmlp_model_cutoff(int64_t model, double *cutoff) {
    *cutoff = gpmlp::object<gpmlp::Model>(model).cutoff();
    return 0;
}

// How many species there are; their atomic numbers go to `out`, if it is given.
GPMLP_API int64_t gpmlp_model_species(int64_t model, int64_t *out) {
    const auto &species = gpmlp::object<gpmlp::Model>(model).species;
    if (out) std::copy(species.begin(), species.end(), out);
    return int64_t(species.size());
}
