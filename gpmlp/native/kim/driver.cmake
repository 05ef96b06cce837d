cmake_minimum_required(VERSION 3.10)
list(APPEND CMAKE_PREFIX_PATH $ENV{KIM_API_CMAKE_PREFIX_DIR})
find_package(KIM-API-ITEMS 2.2 REQUIRED CONFIG)
kim_api_items_setup_before_project(ITEM_TYPE "modelDriver")
project(@NAME@ CXX)
kim_api_items_setup_after_project(ITEM_TYPE "modelDriver")
add_kim_api_model_driver_library(
  NAME ${PROJECT_NAME} CREATE_ROUTINE_NAME "model_driver_create" CREATE_ROUTINE_LANGUAGE "cpp")
target_sources(${PROJECT_NAME} PRIVATE driver.cpp)
find_package(Threads REQUIRED)
target_link_libraries(${PROJECT_NAME} PRIVATE Threads::Threads)

# of the core alone: what KIM generates has to stay visible
set(FLAGS -std=c++17 -O3 -fvisibility=hidden -fno-gnu-unique -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi)
include(CheckCXXSourceRuns)
check_cxx_source_runs("int main() { return !(__builtin_cpu_supports(\"avx2\") && __builtin_cpu_supports(\"fma\") && __builtin_cpu_supports(\"bmi2\")); }" RUNS_V3)
if(RUNS_V3) # this processor, and those that its programs are for
  list(APPEND FLAGS -march=x86-64-v3)
endif()
set_source_files_properties(driver.cpp PROPERTIES COMPILE_OPTIONS "${FLAGS}" COMPILE_DEFINITIONS "GPMLP_VERSION=\"@VERSION@\"")
