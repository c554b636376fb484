//! An input's parts.

/// The first `N` parts; those that are not there are empty, and the last one has the rest.
pub fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == 0x1e);
    [(); N].map(|()| parts.next().unwrap_or_default())
}

/// As text; what is not UTF-8 is replaced.
pub fn text(part: &[u8]) -> String {
    String::from_utf8_lossy(part).into_owned()
}
