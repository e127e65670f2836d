//! The table's JSON, laid out so that a diff of two tables reads layer by layer: keys and objects of an
//! array begin a line down to a layer's groups; numbers of an array stay together.

use super::Table;
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};
use std::io::{self, Write};

/// Objects nested deeper than this, a group's, stay on their line.
const DEEPEST: usize = 4;

/// The table as text, a newline at its end.
pub(super) fn write(table: &Table) -> String {
    let mut out = Vec::new();
    let mut json = serde_json::Serializer::with_formatter(&mut out, Lines::default());
    // Invariant: the types have string keys only, and a vector takes whatever is written to it.
    table.serialize(&mut json).expect("a table is representable as JSON");
    out.push(b'\n');
    // Invariant: serde_json writes UTF-8.
    String::from_utf8(out).expect("JSON is UTF-8")
}

#[derive(Default)]
struct Lines {
    /// Objects that are open.
    depth: usize,
    /// Whether an array's element comes next and nothing of it is written.
    element: bool,
}

impl Lines {
    fn line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        out.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| out.write_all(b" "))
    }
}

impl Formatter for Lines {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.element = true;
        if first { Ok(()) } else { out.write_all(b",") }
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.element = false;
        out.write_all(b"]")
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        if self.element && self.depth < DEEPEST {
            self.line(out)?;
        }
        self.element = false;
        self.depth += 1;
        out.write_all(b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.depth -= 1;
        CompactFormatter.end_object(out)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(b",")?;
            // The first key shares its brace's line.
            if self.depth < DEEPEST {
                return self.line(out);
            }
        }
        Ok(())
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.element = false;
        out.write_all(b": ")
    }
}
