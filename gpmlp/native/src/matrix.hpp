// Products of tall matrices with a constant one that is stored in panels of columns.
#pragma once

#include "lanes.hpp"

namespace gpmlp {

constexpr int PANEL = 2;   // lanes of columns side by side
constexpr int DEPTH = 256; // of a panel at a time: it stays in the innermost cache while all rows pass

// A matrix (depth, columns), in panels of PANEL lanes of columns with zeros behind the last.
template <class T> class PanelMatrix {
    static constexpr int WIDE = PANEL * WIDTH<T>;
    Array<T> panels;

  public:
    int depth = 0, columns = 0;

    PanelMatrix() = default;
    // Of element (i, j) = from[i * row + j * deep].
    template <class From>
    PanelMatrix(int depth, int columns, const From *from, std::ptrdiff_t row, std::ptrdiff_t column) : depth(depth), columns(columns) {
        panels.assign(std::size_t(row_length(columns)) * depth, 0);
        for (int j = 0; j < columns; j++)
            for (int i = 0; i < depth; i++) panels[std::size_t(j / WIDE * depth + i) * WIDE + j % WIDE] = T(from[i * row + j * column]);
    }

    // Numbers of a row that hold these columns in whole panels.
    static int row_length(int columns) { return (columns + WIDE - 1) / WIDE * WIDE; }

    // c = a B, or c += a B; rows of a and c follow after a_row and c_row, those of c are of whole panels. An element of
    // c is a sum in the order of the depth, whatever the number of rows.
    void multiply(int rows, const T *a, int a_row, T *c, int c_row, bool add = false) const {
        multiply_part(rows, 0, depth, 0, columns, a, a_row, c, c_row, add);
    }

    // The same where B is zero below its diagonal.
    void multiply_triangle(int rows, const T *a, int a_row, T *c, int c_row) const {
        for (int left = 0; left < columns; left += WIDE)
            multiply_part(rows, 0, std::min(depth, left + WIDE), left, left + WIDE, a, a_row, c + left, c_row, false);
    }

    // The same of rows `top` to `bottom` of B and its columns `left` (the first of a panel) to `right`, with which a
    // and c begin.
    void multiply_part(int rows, int top, int bottom, int left, int right, const T *a, int a_row, T *c, int c_row, bool add) const {
        for (int k = top; k < bottom; k += DEPTH) {
            const int deep = std::min(DEPTH, bottom - k);
            for (int panel = left / WIDE; panel * WIDE < right; panel++) {
                const T *b = panels.data() + (std::size_t(panel) * depth + k) * WIDE;
                T *to = c + panel * WIDE - left;
                for (int i = 0, pieces = (rows + 5) / 6; i < rows; pieces--) {
                    const int here = (rows - i + pieces - 1) / pieces;
                    const T *from = a + std::size_t(i) * a_row + (k - top);
                    rows_of(here, deep, from, a_row, b, to + std::size_t(i) * c_row, c_row, add || k > top);
                    i += here;
                }
            }
        }
    }

  private:
    static void rows_of(int rows, int deep, const T *a, int a_row, const T *b, T *c, int c_row, bool add) {
        switch (rows) {
        case 1: return tile<1>(deep, a, a_row, b, c, c_row, add);
        case 2: return tile<2>(deep, a, a_row, b, c, c_row, add);
        case 3: return tile<3>(deep, a, a_row, b, c, c_row, add);
        case 4: return tile<4>(deep, a, a_row, b, c, c_row, add);
        case 5: return tile<5>(deep, a, a_row, b, c, c_row, add);
        default: return tile<6>(deep, a, a_row, b, c, c_row, add);
        }
    }

    template <int R> static void tile(int deep, const T *a, int a_row, const T *b, T *c, int c_row, bool add) {
        Lanes<T> sums[R][PANEL];
#pragma GCC unroll 6
        for (int i = 0; i < R; i++)
#pragma GCC unroll 2
            for (int j = 0; j < PANEL; j++) sums[i][j] = add ? load(c + i * c_row + j * WIDTH<T>) : Lanes<T>{};
        for (int k = 0; k < deep; k++) {
            Lanes<T> x[PANEL];
#pragma GCC unroll 2
            for (int j = 0; j < PANEL; j++) x[j] = load(b + k * WIDE + j * WIDTH<T>);
#pragma GCC unroll 6
            for (int i = 0; i < R; i++) {
                const Lanes<T> u = fill(a[i * a_row + k]);
#pragma GCC unroll 2
                for (int j = 0; j < PANEL; j++) sums[i][j] += u * x[j];
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < R; i++)
#pragma GCC unroll 2
            for (int j = 0; j < PANEL; j++) store(c + i * c_row + j * WIDTH<T>, sums[i][j]);
    }
};

} // namespace gpmlp
