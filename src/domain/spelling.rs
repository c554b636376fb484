//! The spelling under which two ways of typing one name are the same name.

use unicode_normalization::UnicodeNormalization;

/// NFKC, lower case, no surrounding white space. Applying it twice changes nothing more.
///
/// Letters are lowered one by one: `str::to_lowercase` picks the sigma by its neighbours, and a
/// name must not change its spelling with what stands beside it.
pub(super) fn folded(raw: &str) -> String {
    let lowered: String = raw.nfkc().flat_map(char::to_lowercase).collect();
    let composed: String = lowered.nfkc().collect();
    composed.trim().to_owned()
}

/// Characters that do not show, or that change the order in which others show: two names that
/// differ in them look the same to a human.
pub(super) fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(u32::from(c),
            0x00AD | 0x034F | 0x061C | 0x115F | 0x1160 | 0x17B4 | 0x17B5
            | 0x180B..=0x180F | 0x200B..=0x200F | 0x202A..=0x202E | 0x2060..=0x206F
            | 0x3164 | 0xFE00..=0xFE0F | 0xFEFF | 0xFFA0 | 0xFFF0..=0xFFFB
            | 0x1D173..=0x1D17A | 0xE0000..=0xE0FFF)
}
