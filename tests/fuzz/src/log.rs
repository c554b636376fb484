//! Log lines as `serve` writes them, looked at instead of written.

use std::io::{self, Write};

/// A line of ours has a dozen fields; a text from outside is cut at 256 bytes, and escaped.
const LONGEST_LINE: usize = 4096;

/// Every line from now on is checked.
pub fn install() {
    tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::INFO).with_writer(|| Checked).init();
}

struct Checked;

impl Write for Checked {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let shown = String::from_utf8_lossy(&line[..line.len().min(1000)]);
        assert!(line.len() <= LONGEST_LINE, "a log line of {} bytes: {shown}", line.len());
        let (end, text) = line.split_last().expect("a line");
        assert!(*end == b'\n' && !text.iter().any(u8::is_ascii_control), "not one clean log line: {shown:?}");
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
