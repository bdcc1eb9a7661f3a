// All of it in one translation unit: the headers take most of the compiler's time.
#include "copy_rows.cu"
#include "rope_on_load.cu"
