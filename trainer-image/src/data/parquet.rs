//! Parquet: a table whose rows are records, read row by row and only in the columns that are looked at, so that no more than a
//! few pages of each are in memory.
//!
//! A row becomes what it would be in JSON Lines. In a table every struct has all the fields that any has, so a null within one
//! says that the field is not there.

mod bytes;

use super::files::DataFile;
use super::records::{Place, Visit, Wanted};
use crate::error::{Error, Result};
use bytes::AsBytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde::ser::{Error as _, SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How such a file begins.
pub(super) const MAGIC: &[u8; 4] = b"PAR1";

/// Characters of what the library says that an error shows.
const LIBRARY_CHARS: usize = 300;

/// Hands each row to `visit`.
pub(super) fn read(data: &DataFile, file: &File, wanted: &Wanted, visit: Visit<'_>) -> Result<()> {
    let (path, expected) = (data.path.as_path(), &data.expected(wanted));
    let mut table = Table { data, rows: 0 };
    let file = file.try_clone().map_err(|e| Error::storage(path, e))?;
    let reader = table.guard(|| SerializedFileReader::new(file))?;
    let schema = table.guard(|| bytes::schema(reader.metadata().file_metadata().schema()))?;
    let columns = table.columns(schema.root_schema(), wanted)?;
    for group in 0..reader.num_row_groups() {
        let group = table.guard(|| AsBytes::new(reader.get_row_group(group)?, &schema))?;
        let mut rows = table.guard(|| group.get_row_iter(Some(columns.clone())))?;
        while let Some(row) = table.guard(|| rows.next().transpose())? {
            table.rows += 1;
            let place = Place::Row(path, table.rows);
            let wrong = |e: serde_json::Error| place.error(format!("{e}; expected {expected}"));
            let row = serde_json::to_vec(&Whole(&row)).map_err(wrong);
            visit(place, row.as_deref().map_err(Clone::clone))?;
        }
    }
    Ok(())
}

/// A file that is being read.
struct Table<'a> {
    data: &'a DataFile,
    /// Rows that have been read.
    rows: u64,
}

impl Table<'_> {
    /// Does what the library does, which ends some damaged files by a panic.
    fn guard<T>(&self, read: impl FnOnce() -> std::result::Result<T, ParquetError>) -> Result<T> {
        let after = if self.rows > 0 { format!(", after row {}", self.rows) } else { String::new() };
        match catch_unwind(AssertUnwindSafe(read)) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(ParquetError::External(e))) if is_storage(&*e) => Err(Error::storage(&self.data.path, e)),
            Ok(Err(e)) => {
                // It may hold what is in the file.
                let said: String = e.to_string().chars().take(LIBRARY_CHARS).collect();
                Err(Error::input(format!(
                    "{}: the Parquet file cannot be read{after}: {said}",
                    self.data.path.display()
                )))
            }
            Err(_) => Err(Error::input(format!("{}: the Parquet file is damaged{after}", self.data.path.display()))),
        }
    }

    /// The columns that are looked at.
    fn columns(&self, schema: &Type, wanted: &Wanted) -> Result<Type> {
        let all = schema.get_fields();
        let looked_for: Vec<_> = wanted.fields.iter().map(|field| self.data.field(field)).collect();
        let some: Vec<_> = all.iter().filter(|column| looked_for.contains(&column.name())).cloned().collect();
        if some.is_empty() {
            let names: Vec<_> = all.iter().map(|column| column.name()).collect();
            return Err(Error::input(format!(
                "{}: the table has the columns [{}], and none that is looked for; expected {}",
                self.data.path.display(),
                names.join(", "),
                self.data.expected(wanted)
            )));
        }
        self.guard(|| Type::group_type_builder(schema.name()).with_fields(some).build())
    }
}

/// Whether the system has said so: those that unpack say what is wrong with a file in the same way.
fn is_storage(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.raw_os_error().is_some())
}

/// A row with all its columns, those that are null too.
struct Whole<'a>(&'a Row);

impl Serialize for Whole<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, field) in self.0.get_column_iter() {
            map.serialize_entry(name, &Part(field))?;
        }
        map.end()
    }
}

/// A value of a row.
struct Part<'a>(&'a Field);

impl Serialize for Part<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        match self.0 {
            Field::Null => to.serialize_unit(),
            Field::Bool(value) => to.serialize_bool(*value),
            Field::Byte(n) => to.serialize_i8(*n),
            Field::Short(n) => to.serialize_i16(*n),
            Field::Int(n) | Field::Date(n) | Field::TimeMillis(n) => to.serialize_i32(*n),
            Field::Long(n) | Field::TimeMicros(n) | Field::TimestampMillis(n) | Field::TimestampMicros(n) => {
                to.serialize_i64(*n)
            }
            Field::UByte(n) => to.serialize_u8(*n),
            Field::UShort(n) => to.serialize_u16(*n),
            Field::UInt(n) => to.serialize_u32(*n),
            Field::ULong(n) => to.serialize_u64(*n),
            Field::Float16(n) => to.serialize_f32(n.to_f32()),
            Field::Float(n) => to.serialize_f32(*n),
            Field::Double(n) => to.serialize_f64(*n),
            // No format has a field for such a number, so it need not be exact.
            Field::Decimal(_) => to.serialize_f64(self.0.to_string().parse().unwrap_or(f64::NAN)),
            Field::Str(text) => to.serialize_str(text),
            // Texts come so, whether the table says that they are texts or not.
            Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
                Ok(text) => to.serialize_str(text),
                Err(_) => Err(S::Error::custom("a column holds bytes that are no text in UTF-8")),
            },
            Field::Group(row) => {
                let mut map = to.serialize_map(None)?;
                for (name, field) in row.get_column_iter().filter(|(_, field)| !matches!(field, Field::Null)) {
                    map.serialize_entry(name, &Part(field))?;
                }
                map.end()
            }
            Field::ListInternal(list) => {
                let mut all = to.serialize_seq(Some(list.len()))?;
                list.elements().iter().try_for_each(|element| all.serialize_element(&Part(element)))?;
                all.end()
            }
            Field::MapInternal(entries) => {
                let mut map = to.serialize_map(None)?;
                for (name, field) in entries.entries() {
                    let name = match name {
                        Field::Str(name) => Some(name.as_str()),
                        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok(),
                        _ => None,
                    };
                    let name = name.ok_or_else(|| S::Error::custom("a column holds a map whose keys are no texts"))?;
                    map.serialize_entry(name, &Part(field))?;
                }
                map.end()
            }
            #[allow(unreachable_patterns)] // the library may learn of more
            other => Err(S::Error::custom(format!("a column holds {other:?}, which no record has"))),
        }
    }
}

#[cfg(test)]
mod tests;
