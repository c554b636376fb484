//! Reads the headers of messages that anybody may have written.
//!
//! Kafka allows any bytes as the name of a header. rdkafka panics when a name is not UTF-8, and offers no
//! way to ask beforehand, so every header is read behind a guard of its own: a name that cannot be read
//! costs that header alone. Every consumer of foreign messages reads headers through this module.
//!
//! Two things cannot be seen from here. A name that contains a NUL ends at it: `ce_id\0x` reads as `ce_id`.
//! And headers whose encoding is broken as a whole look like no headers at all.

use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

use rdkafka::message::Headers;

#[cfg(not(panic = "unwind"))]
compile_error!("headers are read behind a guard that needs `panic = \"unwind\"`");

/// The headers of one message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MessageHeaders<'m> {
    /// Name and value of each header that could be read, in their order. A name may come more than once.
    pub readable: Vec<(&'m str, Option<&'m [u8]>)>,
    /// How many headers have a name that is not UTF-8.
    pub unreadable: usize,
}

impl<'m> MessageHeaders<'m> {
    /// Reads the headers of a message: `MessageHeaders::read(message.headers())`.
    pub fn read<H: Headers>(headers: Option<&'m H>) -> Self {
        let mut read = Self::default();
        let Some(headers) = headers else { return read };
        for index in 0..headers.count() {
            match quietly(|| headers.try_get(index)) {
                Some(Some(header)) => read.readable.push((header.key, header.value)),
                Some(None) => break,
                None => read.unreadable += 1,
            }
        }
        read
    }

    /// Returns the value of the first header with this name.
    pub fn get(&self, name: &str) -> Option<&'m [u8]> {
        self.readable.iter().find(|(other, _)| *other == name)?.1
    }

    /// Returns the value of the first header with this name, if it is UTF-8.
    pub fn text(&self, name: &str) -> Option<&'m str> {
        std::str::from_utf8(self.get(name)?).ok()
    }
}

thread_local! {
    static READING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `read`; `None` when it panics. Nothing is printed then: the caller reports the message, and a
/// stranger must not be able to fill the log with panics.
fn quietly<T>(read: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !READING.get() {
                before(info);
            }
        }));
    });
    READING.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(read));
    READING.set(false);
    result.ok()
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Header;

    use super::*;

    /// Behaves as rdkafka's own headers do.
    struct Raw(Vec<(&'static [u8], Option<&'static [u8]>)>);

    impl Headers for Raw {
        fn count(&self) -> usize {
            self.0.len()
        }

        fn try_get(&self, index: usize) -> Option<Header<'_, &[u8]>> {
            let (name, value) = *self.0.get(index)?;
            Some(Header { key: std::str::from_utf8(name).unwrap(), value })
        }
    }

    #[test]
    fn a_name_that_is_not_utf_8_costs_that_header_alone() {
        let raw = Raw(vec![
            (b"ce_id", Some(b"1")),
            (b"\xff\xfe", Some(b"2")),
            (b"saga-id", Some(b"3")),
            (b"\xc3", None),
            (b"ce_id", Some(b"4")),
            (b"bytes", Some(b"\xff")),
            (b"null", None),
        ]);
        let headers = MessageHeaders::read(Some(&raw));
        assert_eq!(headers.unreadable, 2);
        assert_eq!(headers.readable.len(), 5);
        assert_eq!(headers.text("ce_id"), Some("1"));
        assert_eq!(headers.text("saga-id"), Some("3"));
        assert_eq!((headers.get("bytes"), headers.text("bytes")), (Some(&b"\xff"[..]), None));
        assert_eq!((headers.get("null"), headers.get("absent")), (None, None));
    }

    #[test]
    fn a_message_without_headers_has_none() {
        assert_eq!(MessageHeaders::read(None::<&Raw>), MessageHeaders::default());
    }
}
