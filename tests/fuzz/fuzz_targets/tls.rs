//! Fuzz target: NBD over TLS: the gate, and what comes after. See `vold::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vold::fuzz::tls(data));
