"""Adapting vision models to labelled pictures: models (`vision`), what is compared (`contestants`), how it learns."""
