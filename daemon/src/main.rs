//! `vold`: serves encrypted, mirrored volumes to virtual machines.

use std::process::ExitCode;

// The doors of the fuzz targets lead past authorisation.
const _: () = assert!(
    !cfg!(feature = "fuzzing"),
    "the daemon must not be built with its feature `fuzzing`"
);

fn main() -> ExitCode {
    vold::main()
}
