"""The compiled core: loops over pairs and environments in C++ (`src`), and the library made of them."""
