//! A table whose texts are read as the bytes that they are. Of one that is no text in UTF-8 the library says so with all of it,
//! and cannot go on to the next row.

use parquet::basic::{ConvertedType, Type as Physical};
use parquet::bloom_filter::Sbbf;
use parquet::column::page::PageReader;
use parquet::errors::Result;
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use parquet::file::reader::RowGroupReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::{SchemaDescriptor, Type};
use std::sync::Arc;

/// A row group in which a text is bytes.
pub(super) struct AsBytes<'r> {
    inner: Box<dyn RowGroupReader + 'r>,
    metadata: RowGroupMetaData,
}

impl<'r> AsBytes<'r> {
    /// The same row group; `schema` is that of the table as [`schema`] makes it.
    pub fn new(inner: Box<dyn RowGroupReader + 'r>, schema: &Arc<SchemaDescriptor>) -> Result<Self> {
        let columns = schema.columns().iter().map(|column| ColumnChunkMetaData::builder(Arc::clone(column)).build());
        let metadata = RowGroupMetaData::builder(Arc::clone(schema)).set_num_rows(inner.metadata().num_rows());
        let metadata = metadata.set_column_metadata(columns.collect::<Result<_>>()?).build()?;
        Ok(Self { inner, metadata })
    }
}

impl RowGroupReader for AsBytes<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        &self.metadata
    }

    fn num_columns(&self) -> usize {
        self.inner.num_columns()
    }

    fn get_column_page_reader(&self, i: usize) -> Result<Box<dyn PageReader>> {
        self.inner.get_column_page_reader(i)
    }

    fn get_column_bloom_filter(&self, i: usize) -> Option<&Sbbf> {
        self.inner.get_column_bloom_filter(i)
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

/// The schema of a table in which a text is bytes.
pub(super) fn schema(table: &Type) -> Result<Arc<SchemaDescriptor>> {
    Ok(Arc::new(SchemaDescriptor::new(column(table)?)))
}

fn column(of: &Type) -> Result<Arc<Type>> {
    let (info, name) = (of.get_basic_info(), of.name());
    let texts = [ConvertedType::UTF8, ConvertedType::ENUM, ConvertedType::JSON];
    let built = if of.is_group() {
        let fields = of.get_fields().iter().map(|field| column(field)).collect::<Result<_>>()?;
        let group = Type::group_type_builder(name).with_fields(fields).with_converted_type(info.converted_type());
        let group = group.with_logical_type(info.logical_type_ref().cloned());
        if info.has_repetition() { group.with_repetition(info.repetition()).build() } else { group.build() }
    } else if of.get_physical_type() == Physical::BYTE_ARRAY && texts.contains(&info.converted_type()) {
        Type::primitive_type_builder(name, Physical::BYTE_ARRAY).with_repetition(info.repetition()).build()
    } else {
        Ok(of.clone())
    };
    built.map(Arc::new)
}
