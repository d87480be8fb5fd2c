//! Many rows in one statement.
//!
//! A statement costs as much as three rows do. One that may fail half-way, because it sets off a trigger or
//! replaces rows, costs far more: SQLite keeps a copy of every page it touches until it ends.

use rusqlite::Connection;
use rusqlite::types::{ToSqlOutput, ValueRef};

/// Rows in one statement.
const TOGETHER: usize = 50;

/// A statement that takes a list of rows.
pub(super) struct Together {
    /// What stands before the list.
    pub(super) head: &'static str,
    /// The placeholders of one row.
    pub(super) row: &'static str,
    /// What stands behind the list.
    pub(super) tail: &'static str,
}

impl Together {
    fn sql(&self, rows: usize) -> String {
        let list = vec![self.row; rows].join(",");
        [self.head, &list, self.tail].concat()
    }

    /// Runs it for all rows, in their order; the number of rows of the table that it changed.
    pub(super) fn run<T, const N: usize>(
        &self,
        c: &Connection,
        rows: &[T],
        values: impl for<'a> Fn(&'a T) -> [ValueRef<'a>; N],
    ) -> rusqlite::Result<usize> {
        let mut changed = 0;
        for (size, rows) in [
            (TOGETHER, rows.chunks_exact(TOGETHER)),
            (1, rows.chunks_exact(TOGETHER).remainder().chunks_exact(1)),
        ] {
            if rows.len() == 0 {
                continue;
            }
            let mut statement = c.prepare_cached(&self.sql(size))?;
            for some in rows {
                for (i, row) in some.iter().enumerate() {
                    for (j, value) in values(row).into_iter().enumerate() {
                        let at = i * N + j + 1;
                        statement.raw_bind_parameter(at, ToSqlOutput::Borrowed(value))?;
                    }
                }
                changed += statement.raw_execute()?;
            }
        }
        Ok(changed)
    }
}
