//! What the fuzz targets in `tests/fuzz` call: one function a target, which panics when the daemon has done what it must not.
//! The same functions run over the targets' corpora, and over seeded changes of them, in the ordinary tests.

/// The NBD server from the greeting on.
pub fn handshake(input: &[u8]) {
    crate::nbd::fuzz::handshake(input);
}

/// The NBD server after the handshake: simple, structured and extended replies.
pub fn transmission(input: &[u8]) {
    crate::nbd::fuzz::transmission(input);
}

/// The NBD server over TLS: in the clear before it, as its records, and under it.
pub fn tls(input: &[u8]) {
    crate::nbd::fuzz::tls(input);
}

/// The control API, authorisation included.
pub fn api(input: &[u8]) {
    crate::api::fuzz::api(input);
}

/// What a vhost-user guest has in its memory: a queue, and requests in it.
pub fn virtqueue(input: &[u8]) {
    crate::vhost::fuzz::walk(input);
}

#[cfg(test)]
mod tests;
