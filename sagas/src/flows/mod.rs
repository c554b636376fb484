//! The sagas themselves, one file each.

pub mod create_user;
